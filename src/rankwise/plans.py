"""A plan: what was chosen for every matrix, before anything is done with it. It is printed, saved, edited and applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.allocation.plan import Ranks, parameters
from rankwise.errors import RankwiseError
from rankwise.integration.files import read_json
from rankwise.integration.result import RANKS, REPORT
from rankwise.layers.matrices import Shape
from rankwise.layers.quantised import WIDTHS
from rankwise.plain import to_json
from rankwise.recipe import FILE as RECIPE
from rankwise.recipe import Recipe
from rankwise.run_folder import digest, write_whole

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A plan holds one rank, or None for dense, for every matrix of a model, and no tensors.

    shapes: the matrices', empty where ranks alone were read. kl: what the plan is predicted to cost, KL(original || compressed)
    in nats per token on calibration text that nothing was chosen on; None where nobody has measured these ranks.
    base_model: the name of the model it was made for. recipe: what was asked for. kept_neurons: of MLPs that have fewer, how
    many, by their last matrix; narrowed: what is left of the shapes of all their matrices, as far as it is known. bits: of the
    matrices that are written in few.
    """

    ranks: Ranks
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    kl: float | None = None
    base_model: str | None = None
    recipe: Recipe | None = None
    kept_neurons: Mapping[str, int] = field(default_factory=dict)
    narrowed: Mapping[str, Shape] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote, or the ranks of a result folder or its `ranks.json`, edited or not.

        Beside ranks alone a `recipe.yaml` is read too. A predicted KL is that of the ranks it was measured with: of edited ones
        it is not known. Raises `RankwiseError` for a file that is neither.
        """
        file = Path(path) / RANKS if Path(path).is_dir() else Path(path)
        content = read_json(file)
        if not isinstance(content, dict):
            raise RankwiseError(f"{file} is no plan: it is not an object of matrices and their ranks")
        if not isinstance(content.get("ranks"), dict):
            asked, report = file.with_name(RECIPE), file.with_name(REPORT)
            told = read_json(report) if report.is_file() else {}
            if not isinstance(told, dict):
                raise RankwiseError(f"{report} is no report: it is not an object of what was measured")
            return cls(
                _ranks(content, file),
                recipe=Recipe.read(file.parent) if asked.is_file() else None,
                kept_neurons=_kept_neurons(told.get("neurons", {}), report),
                bits={name: bits for name, bits in _bits(told.get("bits", {}), report).items() if name in content},
            )
        if content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version")
            raise RankwiseError(f"{file} has format {version!r}, this rankwise reads {FORMAT_VERSION}: make the plan again")
        ranks = _ranks(content["ranks"], file)
        try:
            recipe = None if content["recipe"] is None else Recipe.of(**content["recipe"])
            shapes, narrowed = (
                {name: Shape(*shape) for name, shape in content.get(kind, {}).items()} for kind in ("shapes", "narrowed")
            )
            kept, bits = _kept_neurons(content.get("kept_neurons", {}), file), _bits(content.get("bits", {}), file)
            kl = content["kl"] if content["measured"] == digest(ranks, bits) else None
            return cls(ranks, shapes, kl, content["base_model"], recipe, kept, narrowed, bits)
        except (KeyError, TypeError, AttributeError) as error:
            raise RankwiseError(f"{file} cannot be read as a plan: {error!r}") from None

    def save(self, file: str | Path) -> None:
        """Write the plan as JSON, one matrix a line: `ranks` and `bits` are to be edited. Raises `RankwiseError` where that
        fails."""
        write_whole(Path(file), lambda path: path.write_text(self.to_json() + "\n", encoding="utf-8"))

    def to_json(self) -> str:
        """Return the JSON that `save` writes."""
        about = {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "kl": self.kl,
            "measured": digest(dict(self.ranks), dict(self.bits)),
            "recipe": self.recipe and self.recipe.model_dump(mode="json"),
            "shapes": {name: astuple(shape) for name, shape in self.shapes.items()},
        }
        if self.kept_neurons:
            about["kept_neurons"] = dict(self.kept_neurons)
            about["narrowed"] = {name: astuple(shape) for name, shape in self.narrowed.items()}
        rest = "".join(f',\n "{name}": {to_json(value)}' for name, value in about.items())
        chosen = {"ranks": self.ranks} | ({"bits": self.bits} if self.bits else {})
        first = ",\n".join(f' "{name}": {to_json(dict(value), indent=1)}' for name, value in chosen.items())
        return f"{{\n{first}{rest}\n}}"

    def edited(self, ranks: Ranks | None = None, bits: Mapping[str, int | None] | None = None) -> Plan:
        """Return the plan with these ranks or bits (None: the model's own numbers); its cost is not known."""
        left = {name: number for name, number in {**self.bits, **(bits or {})}.items() if number is not None}
        return replace(self, ranks={**self.ranks, **(ranks or {})}, bits=left, kl=None)

    @property
    def parameters(self) -> int | None:
        """How many parameters the matrices keep; None where shapes are not known."""
        return parameters(self.ranks, {**self.shapes, **self.narrowed}) if self.shapes else None

    def __sub__(self, other: Plan) -> Difference:
        """What changes from `other` to this plan. Raises `RankwiseError` for plans of different matrices."""
        alone = self.ranks.keys() ^ other.ranks.keys()
        if alone:
            raise RankwiseError(f"these are plans of different matrices: only one of them has {min(alone)}")
        changed = {name: (other.ranks[name], rank) for name, rank in self.ranks.items() if rank != other.ranks[name]}
        bits = {name: (other.bits.get(name), self.bits.get(name)) for name in self.ranks}
        bits = {name: (before, after) for name, (before, after) in bits.items() if before != after}
        return Difference(changed, {**(self.shapes or other.shapes), **self.narrowed}, bits)

    def __str__(self) -> str:
        head, kept = f"plan for {self.base_model or 'a model'}", self.parameters
        if kept is not None:
            dense = sum(shape.dense for shape in self.shapes.values())
            head += f": {kept:,} of {dense:,} parameters kept ({kept / dense:.1%})"
        head += ", nobody has measured its KL" if self.kl is None else f", predicted KL {self.kl:.5f} nats per token"
        head += f"; {len(self.kept_neurons)} MLPs with fewer neurons" if self.kept_neurons else ""
        head += f"; {len(self.bits)} matrices in few bits" if self.bits else ""
        rows = ((name, _shown(rank, self.bits.get(name)), self._kept(name)) for name, rank in self.ranks.items())
        return "\n".join([head, *_table(rows)])

    def _kept(self, name: str) -> str:
        shape = self.shapes.get(name)
        left = self.narrowed.get(name, shape)
        return (
            "" if shape is None or left is None else f"{left.parameters(self.ranks[name]) / shape.dense:.0%} of {shape.dense:,}"
        )


@dataclass(frozen=True)
class Difference:
    """What changes from one plan to another. ranks: of each matrix that changes, before and after, None for dense; bits: the
    same, None for the model's own numbers."""

    ranks: dict[str, tuple[int | None, int | None]]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    bits: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters that each of these matrices gains; empty where shapes are not known."""
        of = {name: self.shapes[name].parameters for name in self.ranks if name in self.shapes}
        return {name: of[name](after) - of[name](before) for name, (before, after) in self.ranks.items() if name in of}

    def __str__(self) -> str:
        gained, changed = self.parameters, list(dict.fromkeys([*self.ranks, *self.bits]))
        if not changed:
            return "the plans have the same ranks and bits"
        head = f"{len(changed)} matrices change" + (f", {sum(gained.values()):+,} parameters" if gained else "")
        rows = ((name, ", ".join(self._changes(name)), f"{gained[name]:+,}" if name in gained else "") for name in changed)
        return "\n".join([head, *_table(rows)])

    def _changes(self, name: str) -> Iterator[str]:
        if name in self.ranks:
            yield " -> ".join(_shown(rank) for rank in self.ranks[name])
        if name in self.bits:
            yield " -> ".join("stored" if bits is None else f"{bits} bits" for bits in self.bits[name])


def _ranks(found: Mapping[str, Any], file: Path) -> Ranks:
    for name, rank in found.items():
        if rank is not None and (type(rank) is not int or rank < 1):
            raise RankwiseError(f"{file} has {rank!r} for {name}: a rank is a positive number, or null for dense")
    return dict(found)


def _kept_neurons(found: Any, file: Path) -> dict[str, int]:
    """How many neurons MLPs keep, by their last matrix; of a report, how many of how many."""
    if not isinstance(found, dict):
        raise RankwiseError(
            f"{file} has {found!r} for neurons instead of a positive number for the last matrix of each MLP",
        )
    each = {name: size[0] if isinstance(size, list) and size else size for name, size in found.items()}
    for name, size in each.items():
        if type(size) is not int or size < 1:
            raise RankwiseError(
                f"{file} gives {size!r} neurons to {name!r}, where a plan needs a positive number "
                "for the last matrix of each MLP",
            )
    return each


def _bits(found: Any, file: Path) -> dict[str, int]:
    """In how many bits matrices are written."""
    if not isinstance(found, dict):
        raise RankwiseError(
            f"{file} has {found!r} for bits instead of a number for every matrix that is written in few",
        )
    for name, bits in found.items():
        if type(bits) is not int or bits not in WIDTHS:
            raise RankwiseError(
                f"{file} has {bits!r} bits for {name!r} instead of one of {', '.join(map(str, WIDTHS))}",
            )
    return dict(found)


def _shown(rank: int | None, bits: int | None = None) -> str:
    return ("dense" if rank is None else str(rank)) + ("" if bits is None else f", {bits} bits")


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The rows as lines, names to the left and the rest to the right of columns of equal width."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]
