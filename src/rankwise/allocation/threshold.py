"""One threshold for all matrices: every component that scores above it is kept. Many methods are no more than their scores."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.allocation.plan import Ranks, fill, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.layers.matrices import Shape


def rank_of(components: int, shape: Shape, multiple: int) -> int | None:
    """So many components as a rank: rounded down to the multiple but for the first, dense from the break-even rank on."""
    return None if components > shape.largest_rank() else max(components // multiple, 1) * multiple


def by_threshold(problem: Problem, scores: Mapping[str, Tensor]) -> Allocation:
    """The plan of the lowest threshold that the budget has room for; what it leaves goes to the best scores below.

    scores: matrix -> score [k] of each component, never rising; any may be infinite.
    """
    shapes, budget = problem.shapes, problem.budget
    scores = {name: score.double().cpu() for name, score in scores.items()}

    def plan(threshold: float) -> Ranks:
        return {n: rank_of(int((scores[n] > threshold).sum()), shapes[n], budget.multiple) for n in shapes}

    thresholds = [-torch.inf, *torch.cat([*scores.values()]).unique().tolist()]  # rising, so that the plans shrink
    first = bisect_left(thresholds, True, key=lambda t: parameters(plan(t), shapes) <= budget.parameters)
    ranks = plan(thresholds[first])
    order = sorted(shapes, key=lambda n: -scores[n][ranks[n] or -1].item())
    return Allocation.of_prefixes(fill(ranks, shapes, budget, order), problem.spectra)
