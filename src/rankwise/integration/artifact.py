"""The artifact: one folder that holds a model at every rate.

It is the original model's own folder, which loads as such, with the results of a run beside the weights (`decomposed/`, see
`run_folder.py`): the text's windows, statistics, full-length factors and the price of every component.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.allocation.llrc import choose
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Problem
from rankwise.decomposition.solver import Decomposition
from rankwise.errors import RankwiseError
from rankwise.integration.files import read_json
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.layers.linear import is_linear, weight_of
from rankwise.layers.matrices import Shape, unstack_experts
from rankwise.plain import to_json
from rankwise.recipe import TARGETS, Recipe
from rankwise.run_folder import digest, read_tensors

FILE, RESULTS, WINDOWS, PRICES = "decomposed.json", "decomposed", "windows.safetensors", "prices.safetensors"
FORMAT_VERSION = 1
FREE = frozenset(
    {*TARGETS, "scope", "keep", "allocation", "preset", "options", "rank_multiple", "form", "bits", "device"}
)  # not settled by decomposing


def decomposition_stage(metric: str, name: str) -> str:
    """The stage of a matrix's full-length factors in a run folder."""
    return f"decomposition/{metric}/{name}"


def decomposition_key(identity: str, metric: str) -> str:
    """What full-length factors depend on."""
    return digest(identity, metric)


@dataclass(frozen=True)
class Artifact:
    """What `rankwise decompose` wrote to `folder`.

    recipe: of the decomposition; its rate means nothing. identity: of the run (see `starting.Run`). shapes: of the decomposed
    matrices. parameters: of the whole original model. conversations: as of `Data`.
    """

    folder: Path
    recipe: Recipe
    identity: str
    shapes: dict[str, Shape]
    parameters: int
    conversations: int = 0

    @classmethod
    def at(cls, folder: object) -> Artifact | None:
        """The artifact in a folder, None where there is none. Raises `RankwiseError` for one of another format."""
        if not isinstance(folder, str | Path) or not os.path.isfile(os.path.join(folder, FILE)):
            return None
        file = Path(folder) / FILE
        try:
            saved = read_json(file)
            version = saved["format_version"]
            if version != FORMAT_VERSION:
                raise RankwiseError(f"{file} has format {version!r}, this rankwise reads {FORMAT_VERSION}: decompose again")
            shapes = {name: Shape(*shape[:3]) for name, shape in saved["shapes"].items()}
            recipe, conversations = Recipe.of(**saved["recipe"]), saved.get("conversations", 0)
            return cls(Path(folder), recipe, saved["identity"], shapes, saved["parameters"], conversations)
        except RankwiseError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RankwiseError(f"{file} cannot be read: {error!r}") from None

    def write(self) -> None:
        """Write the description; the results are there already."""
        shapes = {n: [s.out_features, s.in_features, s.added] for n, s in self.shapes.items()}
        saved = {"format_version": FORMAT_VERSION, "identity": self.identity, "parameters": self.parameters}
        saved |= {"conversations": self.conversations, "recipe": self.recipe.model_dump(mode="json"), "shapes": shapes}
        (self.folder / FILE).write_text(to_json(saved, indent=1) + "\n")

    @property
    def results(self) -> Path:
        """The run folder within."""
        return self.folder / RESULTS

    def windows(self) -> Tensor:
        """The calibration text [windows, length]."""
        return read_tensors(self.results / WINDOWS)["windows"]

    def options(self, calibration: object, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a recipe: `options` where they are free, the artifact's own otherwise.

        None is what was not asked for. Raises `RankwiseError` for one that asks for another decomposition.
        """
        if not isinstance(calibration, str | Path | None):
            raise RankwiseError(
                f"{self.folder} holds its own calibration text: run without calibration, or decompose again",
            )
        own = {name: value for name, value in self.recipe.model_dump().items() if name not in FREE}
        asked = {name: value for name, value in options.items() if value is not None}
        source = {} if calibration is None else {"calibration": str(calibration)}
        settled = Recipe.of(**asked | source).model_dump(include={*asked, *source} & own.keys())
        for name, value in settled.items():
            if value != own[name]:
                raise RankwiseError(f"{self.folder} was decomposed with {name}={own[name]!r}, not {value!r}: decompose again")
        return {name: value for name, value in asked.items() if name not in own} | own

    def decomposition(self, name: str) -> Decomposition:
        """The full-length factors of a matrix."""
        metric = str(self.recipe.decomposition)
        stage, key = decomposition_stage(metric, name), decomposition_key(self.identity, metric)
        return Decomposition(**read_tensors(self.results / f"{stage}-{key}.safetensors"))

    def prices(self) -> dict[str, Tensor]:
        """What each component of each matrix is worth: [k] float64, nats per token."""
        return read_tensors(self.results / PRICES)

    def apply(self, model: Any, rate: float, form: str) -> RankwiseConfig:
        """Compress the loaded original, in place, to `rate` in scope "linear", in one of `FORMS`; one matrix's full-length
        factors at a time.

        Raises `RankwiseError` for a rate that cannot be reached and for weights that were not loaded (disk offload).
        """
        from rankwise.integration.factorise import factorise

        shapes = {name: replace(shape, form=form) for name, shape in self.shapes.items()}
        budget = Budget.of(shapes, rate, "linear", self.parameters)
        prices = self.prices()
        chosen = choose(Problem(shapes, {}, budget, None), prices)  # type: ignore[arg-type]  # it asks no student
        experts = unstack_experts(model)
        return factorise(model, _Factors(self, model), chosen.masks, experts, form)


class _Factors(Mapping[str, Decomposition]):
    """The artifact's factors, each read when it is asked for, in the dtype and on the device of the model's weight."""

    def __init__(self, artifact: Artifact, model: Any) -> None:
        self.artifact, self.model = artifact, model

    def __getitem__(self, name: str) -> Decomposition:
        module = self.model.get_submodule(name)
        assert is_linear(module)
        weight = weight_of(module)
        if weight.is_meta:
            raise RankwiseError(f"{name} was not loaded but offloaded: compress {self.artifact.folder} to a folder first")
        return self.artifact.decomposition(name).to(weight.device, weight.dtype)

    def __iter__(self) -> Any:
        return iter(self.artifact.shapes)

    def __len__(self) -> int:
        return len(self.artifact.shapes)
