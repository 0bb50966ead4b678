"""Multiple-choice knapsack: one rank, or dense, for every matrix, at the least total loss within the budget.

min sum_l loss_l(r_l)  s.t.  sum_l cost_l(r_l) <= budget.  The Lagrangian relaxation gives a feasible solution and a lower
bound; an option whose reduced cost exceeds their gap is in no better solution (Everett 1963; Sinha and Zoltners 1979), and the
few that remain are settled by scipy's HiGHS.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from rankwise.allocation.plan import Budget, Ranks, Shapes, fill

RELATIVE_GAP = 1e-3  # far below the error of any price
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def knapsack(prices: Mapping[str, Tensor], shapes: Shapes, budget: Budget) -> Ranks:
    """The plan of least total price dropped.

    prices: matrix -> price [k] of each component, in the order in which components are kept; negative ones count as 0.
    The budget must be reachable (see `Budget.of`); what is left of it in the end goes to the dearest matrices.
    """
    names = list(shapes)
    options = [[*range(budget.multiple, shapes[n].largest_rank(budget.multiple) + 1, budget.multiple), None] for n in names]
    tails = {n: _tail(prices[n].double().clamp_min(0).cpu().numpy()) for n in names}
    width = max(len(o) for o in options)
    loss, cost = np.full((len(names), width), np.inf), np.full((len(names), width), 0.0)
    for row, (name, choices) in enumerate(zip(names, options, strict=True)):
        loss[row, : len(choices)] = [0.0 if r is None else tails[name][r] for r in choices]
        cost[row, : len(choices)] = [shapes[name].parameters(r) for r in choices]
    scale = loss[np.isfinite(loss)].max() or 1.0
    chosen = _solve(loss / scale, cost, float(budget.parameters))
    ranks = {name: options[row][chosen[row]] for row, name in enumerate(names)}
    dearest = sorted(names, key=lambda n: -tails[n][ranks[n] or 0] / shapes[n].per_rank)
    return fill(ranks, shapes, budget, dearest)


def _tail(prices: Floats) -> Floats:
    """[k + 1]: the sum of the prices from position r on."""
    return np.append(np.cumsum(prices[::-1])[::-1], 0.0)


def _solve(loss: Floats, cost: Floats, budget: float) -> Floats:
    """The chosen option [matrices] of each row; loss, cost [matrices, options], where an absent option has infinite loss."""
    rows = np.arange(len(loss))
    best, best_loss, bound, weight = None, np.inf, -np.inf, 0.0
    low, high = 0.0, 1.0
    while cost[rows, (loss + high * cost).argmin(1)].sum() > budget:  # raise the price of a parameter until all fits
        high *= 4
        if high > 1e12:
            return _cheapest(loss, cost)
    for _ in range(100):
        middle = 0.5 * (low + high)
        reduced = loss + middle * cost
        choice = reduced.argmin(1)
        dual = reduced[rows, choice].sum() - middle * budget
        if dual > bound:
            bound, weight = dual, middle
        if cost[rows, choice].sum() > budget:
            low = middle
            continue
        high = middle
        if loss[rows, choice].sum() < best_loss:
            best, best_loss = choice, loss[rows, choice].sum()
    if best is None:
        best = (loss + high * cost).argmin(1)
        best_loss = loss[rows, best].sum()
    reduced = loss + weight * cost
    open_options = reduced - reduced.min(1, keepdims=True) <= best_loss - bound
    open_options[rows, best] = True
    return _settle(loss, cost, budget, best, open_options)


def _cheapest(loss: Floats, cost: Floats) -> Floats:
    return np.where(np.isfinite(loss), cost, np.inf).argmin(1)


def _settle(loss: Floats, cost: Floats, budget: float, best: Floats, open_options: Floats) -> Floats:
    """The best choice among the open options by integer programming, or `best` where none is better."""
    rows = np.arange(len(loss))
    best_loss = loss[rows, best].sum()
    row, column = np.nonzero(open_options & (loss <= best_loss))
    if len(row) == len(loss) or best_loss == 0:
        return best
    one_each = (np.arange(len(loss))[:, None] == row).astype(float)
    result = milp(
        c=loss[row, column] / best_loss,  # HiGHS stops at an absolute gap of 1e-6
        integrality=np.ones(len(row)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[row, column][None] / budget, -np.inf, 1),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "node_limit": 20_000, "presolve": False},  # presolve may print
    )
    if result.x is None:
        return best
    chosen = np.zeros(len(loss), dtype=int)
    picked = result.x > 0.5
    chosen[row[picked]] = column[picked]
    fits = picked.sum() == len(loss) and cost[rows, chosen].sum() <= budget
    return chosen if fits and loss[rows, chosen].sum() < best_loss else best
