"""The ranks of a plan, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.llrc import LLRC
from rankwise.allocation.plan import Ranks, Shapes
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Given:
    """A plan's answer: the first components of every matrix."""

    ranks: Ranks
    decomposition: ClassVar[str] = "kronecker"

    def allocate(self, problem: Problem) -> Allocation:
        """The given ranks, whatever the budget."""
        return Allocation.of_prefixes({name: self.ranks[name] for name in problem.shapes}, problem.spectra)

    def refuse_other(self, shapes: Shapes) -> None:
        """Raises `RankwiseError` where the plan is not one of these matrices, or gives one more than its largest rank."""
        for name in self.ranks:
            if name not in shapes:
                raise RankwiseError(f"the plan has a rank for {name}, which is none of the {len(shapes)} matrices to compress")
        for name, shape in shapes.items():
            if name not in self.ranks:
                raise RankwiseError(f"the plan has no rank for {name}: name one, or null for dense")
            rank, largest = self.ranks[name], shape.largest_rank()
            if rank is not None and rank > largest:
                raise RankwiseError(
                    f"the plan has rank {rank} for {name}, where {largest} is the largest that is smaller than dense: "
                    "name a lower one, or null for dense"
                )


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GivenByLLRC:
    """A plan's answer, and mask values trained as llrc trains those of its own."""

    ranks: Ranks
    llrc: LLRC
    decomposition: ClassVar[str] = "kronecker"

    def allocate(self, problem: Problem) -> Allocation:
        """The given ranks, whatever the budget."""
        chosen = Given(self.ranks).allocate(problem)
        kl = problem.student.divergence(chosen.masks)
        return self.llrc.with_values(problem.student, replace(chosen, history=[{"step": "the plan", "kl": kl}]), kl)

    def reads(self, training: Sequence[Batch], selection: Sequence[Batch], matrices: int) -> tuple[float, float]:
        """Tokens forward and back."""
        return self.llrc.value_reads(training, selection)


def of_plan(ranks: Ranks, allocator: Any) -> Given | GivenByLLRC:
    """What applies the ranks that the allocator chose, or somebody in its place."""
    trains = isinstance(allocator, LLRC) and allocator.value_steps != 0
    return GivenByLLRC(ranks, allocator) if trains else Given(ranks)


def ranks_alone(allocator: Any) -> Any:
    """The same allocator without what it does after its ranks are chosen."""
    return replace(allocator, value_steps=0) if isinstance(allocator, LLRC) else allocator
