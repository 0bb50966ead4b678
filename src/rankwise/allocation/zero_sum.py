"""Zero sum: components are dropped so that the predicted changes of the loss cancel out (Zero-Sum SVD, 2026, arXiv 2602.02848;
code mint-vu/Zero-Sum-SVD).

DeltaL_i = -sigma_i u_i^T H v_i, H the loss's gradient in whitened coordinates, is the change of the text's cross entropy to
first order when component i is dropped: minus its derivative by mask i. In every matrix the last component is the next to go;
of those, the one of least |DeltaL| with the sign that brings the running sum back towards zero. Dropping saves nothing
until a matrix is below its break-even rank; what stays above is dense.

Left out: the correction steps (they change weights) and 8-bit storage.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.plan import fill, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import rank_of


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ZeroSum:
    """Two heaps of candidates, by the sign of their DeltaL."""

    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        """Drop until the budget is met; components of no predicted change go first."""
        shapes, budget = problem.shapes, problem.budget
        changes = {name: (-gradient).tolist() for name, gradient in problem.student.text_gradients().items()}
        kept = {name: len(change) for name, change in changes.items()}
        rising: list[tuple[float, str]] = []
        falling: list[tuple[float, str]] = []

        def offer(name: str) -> None:
            if kept[name] > budget.multiple:
                change = changes[name][kept[name] - 1]
                heappush(rising if change >= 0 else falling, (abs(change), name))

        for name in shapes:
            offer(name)
        ranks = {name: rank_of(kept[name], shapes[name], budget.multiple) for name in shapes}
        size, total = parameters(ranks, shapes), 0.0
        while size > budget.parameters:
            first, second = (rising, falling) if total <= 0 else (falling, rising)
            _, name = heappop(first or second)
            kept[name] -= 1
            total += changes[name][kept[name]]
            size -= shapes[name].parameters(ranks[name])
            ranks[name] = rank_of(kept[name], shapes[name], budget.multiple)
            size += shapes[name].parameters(ranks[name])
            offer(name)
        order = sorted(shapes, key=lambda n: -abs(changes[n][ranks[n] or -1]))
        plan = Allocation.of_prefixes(fill(ranks, shapes, budget, order), problem.spectra)
        return Allocation(plan.ranks, plan.masks, [{"step": "dropped", "predicted change": total}])
