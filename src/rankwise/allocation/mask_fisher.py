"""Mask Fisher: one backward pass prices every component, a knapsack spends the budget. It is where LLRC starts (`llrc.py`).

The price of component i is half the mean squared gradient of the loss with respect to its mask at 1, labels sampled from the
model: the KL that dropping it costs, to second order (Optimal Brain Damage, LeCun et al. 1989; `Student.fisher`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.llrc import choose
from rankwise.allocation.problem import Allocation, Problem


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MaskFisher:
    """Any components, not only the first ones."""

    decomposition: ClassVar[str] = "kronecker"

    def allocate(self, problem: Problem) -> Allocation:
        """The dearest components."""
        return choose(problem, problem.student.fisher())
