"""The knapsack: one rank, or dense, for every matrix, at the least total price dropped within the budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from rankwise.allocation.multiple_choice import Floats, solve
from rankwise.allocation.plan import Budget, Ranks, Shapes, fill, options

RELATIVE_GAP = 1e-3  # far below the error of any price


def knapsack(prices: Mapping[str, Tensor], shapes: Shapes, budget: Budget) -> Ranks:
    """The plan of least total price dropped, up to RELATIVE_GAP where a bound can show it.

    prices: matrix -> price [k] of each component, in the order in which components are kept; negative ones
    count as 0. The budget must be reachable (see `Budget.of`); what is left of it in the end goes to the
    dearest matrices.
    """
    ranks_of = {shape: options(shape, budget.multiple) for shape in set(shapes.values())}
    costs_of = {shape: np.array([shape.parameters(rank) for rank in ranks]) for shape, ranks in ranks_of.items()}
    tails = {name: _tail(prices[name].double().clamp_min(0).cpu().numpy()) for name in shapes}
    lossy = {n: tails[n][budget.multiple :: budget.multiple][: len(ranks_of[s]) - 1] for n, s in shapes.items()}
    losses = [np.append(loss, 0.0) for loss in lossy.values()]
    chosen = solve([costs_of[shape] for shape in shapes.values()], losses, budget.parameters, RELATIVE_GAP)
    ranks = {name: ranks_of[shape][at] for (name, shape), at in zip(shapes.items(), chosen.tolist(), strict=True)}
    dearest = sorted(shapes, key=lambda n: -tails[n][ranks[n] or 0] / shapes[n].per_rank)
    return fill(ranks, shapes, budget, dearest)


def _tail(prices: Floats) -> Floats:
    """[k + 1]: the sum of the prices from position r on."""
    return np.append(np.cumsum(prices[::-1])[::-1], 0.0)
