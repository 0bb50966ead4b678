"""The ranks of a plan, as they are."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.plan import Ranks, Shapes
from rankwise.allocation.problem import Allocation, Problem
from rankwise.errors import RankwiseError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Given:
    """A plan's answer: the first components of every matrix. Values that the plan's run has trained are no part of a plan."""

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
                    "take less, or null for dense"
                )
