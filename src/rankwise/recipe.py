"""Every option of a run: frozen, validated, written beside the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, PositiveInt, ValidationError

from rankwise.errors import RankwiseError, reason

FILE = "recipe.yaml"  # in every result folder
BEFORE_FORMS = {"form": "pair"}  # what recipes did not tell when there was one form
TARGETS = ("rate", "target_bytes", "target_speedup", "ranks")
MIXED = "mixed"  # where ranks and bits are chosen together
ALL, FEWER = "all", "fewer"  # neurons; fewer are chosen before ranks
READING = ("text_column", "dataset_options")  # of a calibration
METHOD = ("preset", "options", "decomposition", "neurons")  # of an allocation
LARGEST = 2**31  # the largest number of windows or tokens: a run over more would never end
DEFAULT_RATE = 0.2
IN_MEMORY = "given in memory"  # the calibration of a recipe whose text is no source that could be named


class Recipe(BaseModel):
    """A recipe holds all options. Equal ones on the same model and text give the same ranks, bit for bit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of parameters to remove; 0.2 if no target is given",
    )
    target_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="instead of a rate: the largest size of the checkpoint, such as 1.5GB or 800MiB",
    )
    target_speedup: float | None = Field(
        None,
        gt=1,
        description="instead of a rate: how many times as fast the model is to decode on this machine, "
        "whose latencies are measured first",
    )
    ranks: dict[str, PositiveInt | None] | None = Field(
        None, description="instead of a rate: the rank of every matrix, as in a plan (None: dense)"
    )
    kept_neurons: dict[str, PositiveInt] = Field(
        {},
        description="with ranks: hidden neurons that each MLP keeps, by its last matrix, as in a plan",
    )
    widths: dict[str, Literal[2, 3, 4, 5, 6, 8]] = Field(
        {}, description="with ranks: the bits of each matrix that is written in few, as in a plan"
    )
    scope: Literal["linear", "model"] = Field(
        "linear",
        description="what the rate is counted over (linear: matrices that may be compressed; model: all)",
    )
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {},
        description="fraction of its parameters that every matrix matching PATTERN keeps (1: stays "
        "dense). The last matching pattern wins; the other matrices make up the difference "
        "to the target. Patterns are written as for include",
    )
    calibration: str = Field(
        "self",
        description="calibration text: a text or JSON-lines file, a folder, the name of a data set, "
        "stdlib:train, or self, for which the model writes its own (text like that of your "
        "use is better)",
    )
    text_column: str = Field(
        "text",
        description="the text's field in JSON lines, tables and data sets without messages or conversations",
    )
    dataset_options: dict[str, str] = Field(
        {}, description="arguments for datasets.load_dataset, such as name=, split= or data_files="
    )
    effort: Literal["quick", "default", "thorough"] = Field(
        "default",
        description="how much text is read, and so how long the run takes; thorough reads 262,144 tokens",
    )
    samples: int | None = Field(
        None,
        ge=1,
        le=LARGEST,
        description="windows of calibration text to read; by default the effort decides",
    )
    length: int | None = Field(
        None, ge=2, le=LARGEST, description="tokens per window; by default the model's context, at most 2048"
    )
    decomposition: str | None = Field(
        None,
        description="metric to decompose in (rankwise methods lists them); by default the allocation's "
        "own, for decompose kronecker",
    )
    allocation: str = Field(
        "llrc",
        description="how ranks are chosen (rankwise methods lists the names), with a preset or options "
        "if wanted, as in llrc:paper or 'kl-knapsack points=3'; an artifact is compressed "
        "by mask-fisher unless told, in seconds",
    )
    preset: str = Field(
        "default",
        description="named set of defaults for the allocation, the same as NAME:PRESET",
    )
    options: dict[str, Any] = Field(
        {},
        description="the allocation's own options, which override those of the preset",
    )
    refine: str | None = Field(
        None,
        description="what trains the weights afterwards: refinements, comma-separated, such as 'distil "
        "passes=2'; the command refine uses distil unless told",
    )
    rank_multiple: PositiveInt = Field(1, description="make every rank a multiple of this")
    bits: Literal["stored", "mixed", "2", "3", "4", "5", "6", "8"] = Field(
        "stored",
        description="stored: the model's own dtype; mixed: bits per matrix chosen to fit target-bytes; "
        "2 to 8: that width everywhere, by GPTQ, without choosing ranks",
    )
    neurons: Literal["all", "fewer"] | None = Field(
        None,
        description="fewer: remove hidden neurons from an MLP where that costs less than lower ranks; "
        "all: keep them. By default fewer with llrc, all with the others",
    )
    form: Literal["pivoted", "pair"] = Field(
        "pivoted",
        description="how a low-rank matrix is written: pivoted, as some of its rows and combinations "
        "of them, or as a pair of factors",
    )
    include: tuple[str, ...] = Field(
        (),
        description="compress only the matrices that match: a glob over paths, a class, or re: and a regex",
    )
    exclude: tuple[str, ...] = Field(
        (),
        description="keep the matrices that match dense; patterns are written as for include",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype to load the model in; auto is the one its weights are stored in"
    )
    device: str = Field(
        "auto",
        description="device to compute on: cpu, cuda, cuda:1 and so on; auto picks a GPU where there is one",
    )
    memory: str | None = Field(
        None,
        description="memory the run may take, such as 8GB; it then works block by block",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed for everything random: the same seed gives the same ranks",
    )

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """Make the recipe of these fields. Raises `RankwiseError` for an unknown one and for a bad value."""
        targets = [name for name in TARGETS if fields.get(name) is not None]
        if len(targets) > 1:
            raise RankwiseError(f"{' and '.join(targets)} are two targets: ask for one")
        fields = {"bits": "stored"} | fields
        fields["bits"] = bits = str(fields["bits"])
        alike = bits not in ("stored", MIXED)
        if bits != "stored":
            fields = {"allocation": MIXED, "decomposition": "whitened" if alike else None} | fields
        try:
            recipe = cls(**fields if targets or alike else {**fields, "rate": DEFAULT_RATE})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise RankwiseError(f"unknown option {name!r}; there are {', '.join(cls.model_fields)}") from None
            meaning = f" ({cls.model_fields[name].description})" if name in cls.model_fields else ""
            raise RankwiseError(f"{name}={first['input']!r}{meaning}: {first['msg'].lower()}") from None
        if recipe.bits != "stored" or (recipe.allocation == MIXED and recipe.ranks is None):
            recipe._refuse_beside_bits()
        if recipe.in_bits:
            recipe._refuse_beside_whole_numbers()
        if recipe.narrows:
            recipe._refuse_beside_fewer_neurons()
        return recipe

    @property
    def in_bits(self) -> bool:
        """Whether matrices are written in few bits: chosen, the same for all, or a plan's."""
        return self.bits != "stored" or bool(self.widths)

    @property
    def width(self) -> int | None:
        """The bits of every matrix, where they are the same; None where they are not, or are chosen."""
        return int(self.bits) if self.bits.isdigit() else None

    @property
    def narrows(self) -> bool:
        """Whether MLPs may lose neurons."""
        return self.neurons == FEWER or bool(self.kept_neurons)

    def _refuse_beside_bits(self) -> None:
        """Raises `RankwiseError` for what cannot stand beside few bits."""
        asked = f"bits={self.bits}"
        if self.bits == "stored" or self.allocation != MIXED:
            raise RankwiseError(
                f"{asked} and allocation={self.allocation}: with bits, no ranks are chosen. Give only one",
            )
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if self.width is None and targets != ["target_bytes"]:
            raise RankwiseError(f"{asked} spends bytes: give target_bytes as the target")
        if self.width is not None and targets:
            raise RankwiseError(
                f"{asked} and {targets[0]} are two targets: give one, or bits=mixed with target_bytes",
            )
        if self.keep:
            raise RankwiseError(
                f"{asked} applies to every matrix: remove keep, or exclude what is to stay as it is",
            )

    def _refuse_beside_whole_numbers(self) -> None:
        """Raises `RankwiseError` for what cannot stand beside matrices in few bits, and for a plan's that are no matrices."""
        asked = "a plan with bits" if self.widths else f"bits={self.bits}"
        if others := self.widths.keys() - (self.ranks or {}).keys():
            raise RankwiseError(
                f"the plan has bits for {min(others)}, but no rank: give one, or null for dense",
            )
        if self.memory is not None:
            raise RankwiseError(f"{asked} needs the whole model in memory: remove memory")
        if self.narrows:
            raise RankwiseError(f"fewer neurons and {asked} do not go together yet: ask for one")

    def _refuse_beside_fewer_neurons(self) -> None:
        """Raises `RankwiseError` for what cannot stand beside fewer neurons yet."""
        if self.kept_neurons and self.ranks is None:
            raise RankwiseError("kept_neurons are part of a plan: give its ranks too")
        if self.neurons == FEWER and self.ranks is not None:
            raise RankwiseError("a plan says itself how many neurons stay: remove neurons")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file or a result folder. Raises `RankwiseError` where there is none."""
        of_result = Path(path).is_dir()
        file = Path(path) / FILE if of_result else Path(path)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise RankwiseError(f"{file} cannot be read: {reason(error)}") from None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise RankwiseError(f"{file} is not a list of options and their values")
        try:
            return cls.of(**(BEFORE_FORMS if of_result else {}) | content)
        except RankwiseError as error:
            raise RankwiseError(f"{file}: {error}") from None

    def write(self, file: Path) -> None:
        """Write the recipe to a YAML file, from which `read` makes an equal one."""
        file.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def under(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields asked for, and this recipe's for the others: another target replaces its target,
        another allocation its method, another text how its text is read, and ranks replace both target and
        method. Raises `RankwiseError` where a text is missing that no source names."""
        taken = {*asked, *(TARGETS if asked.keys() & set(TARGETS) else ()), *(METHOD if "allocation" in asked else ())}
        taken |= set(READING) if "calibration" in asked else set()
        if "ranks" in asked:
            taken |= {"keep", "bits", "neurons", "kept_neurons", "widths"}
        elif self.ranks is not None and taken & {"rate", "allocation"}:
            taken |= {"ranks", "kept_neurons", "widths", "allocation"}
        fields = {name: value for name, value in self.model_dump().items() if name not in taken and value is not None}
        if fields.get("calibration") == IN_MEMORY:
            raise RankwiseError(
                "the recipe's calibration text was given in memory: give it again, or name another",
            )
        return fields | dict(asked)
