"""What a refinement is, the list of those there are, and how several are done one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from torch import nn

from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError
from rankwise.masks.student import Layers, Student
from rankwise.options import made_of, pairs
from rankwise.refinement.blocks import BlockByBlock
from rankwise.refinement.distil import Distil


class Refinement(Protocol):
    """A frozen dataclass whose fields are the method's options."""

    def try_out(self, model: Any, matrices: Collection[str], batch: Batch) -> None:
        """Raises `RankwiseError` where a model with these matrices, and such batches, cannot be refined so."""
        ...

    def trained(self, model: nn.Module, matrices: Collection[str]) -> list[str]:
        """Those of the matrices, the most, that are trained at once."""
        ...

    def refine(self, student: Student, layers: Layers, losses: list[float]) -> dict[str, nn.Module]:
        """New layers in place of `layers`, the compressed ones that the student's model gets: of the same class, rank and dtype
        each. What each step loses, nats per token, is added to `losses`; deterministic by the student's seed."""
        ...

    def reads(self, training: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward and back."""
        ...


REFINEMENTS: dict[str, type[Refinement]] = {"blocks": BlockByBlock, "distil": Distil}


def refinements_named(text: str) -> list[Refinement]:
    """Those that are written NAME [KEY=VALUE ...], with commas between. Raises `RankwiseError` for what is none."""
    return [_named(part.strip()) for part in text.split(",") if part.strip()]


def _named(text: str) -> Refinement:
    name, *options = text.split()
    if name not in REFINEMENTS:
        raise RankwiseError(f"unknown refinement {name!r}; there are {', '.join(REFINEMENTS)}")
    return made_of(REFINEMENTS[name], pairs(options), name)


def refined(
    student: Student, layers: Layers, refinement: Refinement, other: Sequence[Batch] = ()
) -> tuple[Layers, list[dict[str, Any]]]:
    """The layers after the refinement, and a record of it, as of `if_better`."""
    return if_better(student, layers, refinement, lambda losses: refinement.refine(student, layers, losses), other)


def if_better(
    student: Student,
    layers: Layers,
    refinement: Refinement,
    refine: Callable[[list[float]], Layers],
    other: Sequence[Batch] = (),
) -> tuple[Layers, list[dict[str, Any]]]:
    """What `refine` makes of the layers, adding to a list of losses, and a record of it; where it does not lower the KL on the
    selection text, or raises it on the `other` text, the layers as they were."""
    losses: list[float] = []
    before, found = _costs(student, layers, other), refine(losses)
    after = _costs(student, found, other)
    name = next(name for name, cls in REFINEMENTS.items() if type(refinement) is cls)
    records = [{"step": f"before {name}", **before}, {"step": name, **after, "losses": [float(f"{x:.4g}") for x in losses]}]
    better = after["kl"] < before["kl"] and all(after[text] <= before[text] for text in before)
    return (found if better else layers), records


def _costs(student: Student, layers: Layers, other: Sequence[Batch]) -> dict[str, float]:
    return {"kl": student.cost(layers)} | ({"other_kl": student.cost(layers, other)} if other else {})
