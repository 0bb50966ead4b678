"""Uniform: every matrix keeps the same fraction of its parameters (SVD-LLM, arXiv 2403.07378, and most others)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.plan import Ranks, fill, parameters
from rankwise.allocation.problem import Allocation, Problem


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Uniform:
    """rank = floor(keep m n / (m + n)), in another form than a pair of factors that of as many parameters; what the rounding
    leaves goes first where it took most."""

    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        """The same fraction of every matrix; ranks stay at least one multiple."""
        shapes, budget = problem.shapes, problem.budget
        dense: Ranks = dict.fromkeys(shapes)
        if parameters(dense, shapes) <= budget.parameters:
            return Allocation.of_prefixes(dense, problem.spectra)
        keep = budget.parameters / parameters(dense, shapes)
        ranks: Ranks = {}
        lost: dict[str, float] = {}
        for name, shape in shapes.items():
            exact = shape.rank_of(keep * shape.dense)
            ranks[name] = max(budget.multiple, int(exact // budget.multiple) * budget.multiple)
            lost[name] = exact - int(exact // budget.multiple) * budget.multiple
        for name in sorted(shapes, key=lambda n: -shapes[n].per_rank):  # the floor of one multiple may have cost too much
            while parameters(ranks, shapes) > budget.parameters and (ranks[name] or 0) > budget.multiple:
                ranks[name] = (ranks[name] or 0) - budget.multiple
        return Allocation.of_prefixes(fill(ranks, shapes, budget, sorted(shapes, key=lambda n: -lost[n])), problem.spectra)
