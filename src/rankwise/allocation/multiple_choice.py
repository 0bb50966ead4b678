"""The multiple-choice knapsack: one option of each item, at the least total loss within the budget.

min sum_i loss_i(o_i)  s.t.  sum_i cost_i(o_i) <= budget

1. Relaxation: steps along the lower convex hulls of the items' options, the most loss saved per cost
   first, until the budget is spent (Sinha and Zoltners 1979). At the rate w of the step that passes it, no
   plan loses less than the bound  sum_i min_o (loss_i(o) + w cost_i(o)) - w budget.
2. Exchanges, from both sides of that step: one item's option for that which saves most of all that fit.
3. A dynamic programme over the core: the options whose loss + w cost is no further above their item's least
   than the plan is above the bound; no other is in a better plan (Dyer, Riha and Walker 1995). It is exact
   within CORE and SUMS; beyond, options and states are thinned out. It is left out where the plan is good
   enough already and the core is not small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

CORE = 2_000  # options of all items
FEWEST = 4  # options of an item, however many items there are
SUMS = 2_000_000  # of a state and an option
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Options(NamedTuple):
    """Those of all items that no cheaper one is as good as; an item's stand together, their cost rising.

    item, position (among all of the item's), cost, loss: [options]; first: [items], where an item's begin.
    A plan is the index [items] of one option each.
    """

    item: Ints
    position: Ints
    cost: Ints
    loss: Floats
    first: Ints

    @classmethod
    def of(cls, costs: Sequence[Ints], losses: Sequence[Floats]) -> Options:
        """Leave out what is dominated."""
        kept = [_undominated(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
        sizes = np.array([len(k) for k in kept])
        return cls(
            np.repeat(np.arange(len(kept)), sizes),
            np.concatenate(kept),
            np.concatenate([cost[k] for cost, k in zip(costs, kept, strict=True)]),
            np.concatenate([loss[k] for loss, k in zip(losses, kept, strict=True)]),
            np.cumsum(sizes) - sizes,
        )

    def total_cost(self, plan: Ints) -> int:
        """Cost of all items."""
        return int(self.cost[plan].sum())

    def total_loss(self, plan: Ints) -> float:
        """Loss of all items."""
        return float(self.loss[plan].sum())


def solve(costs: Sequence[Ints], losses: Sequence[Floats], budget: int, tolerance: float) -> Ints:
    """The position [items] of the option chosen of each: the best plan of the steps that were needed to show
    that it loses no more than (1 + tolerance) times the least, or of all of them.

    costs, losses: [options] of each item, in any order; losses are not negative. The cheapest are chosen where
    even these exceed the budget.
    """
    options = Options.of(costs, losses)
    if options.total_cost(options.first) > budget:
        return options.position[options.first]
    before, after, rate = _relax(options, budget)
    best = min((_exchange(options, plan, budget) for plan in (before, after)), key=options.total_loss)
    reduced = options.loss + rate * options.cost
    least = np.minimum.reduceat(reduced, options.first)
    bound = float(least.sum()) - rate * budget
    reduced -= least[options.item]
    gap = options.total_loss(best) - bound
    is_open = reduced <= gap
    is_open[best] = True  # up to rounding they are
    core = np.flatnonzero(is_open)
    core = core[np.bincount(options.item[core])[options.item[core]] > 1]
    if len(core) and (gap > tolerance * bound or len(core) <= CORE):
        better = _programme(options, best, core, reduced, rate, budget)
        best = min(best, _exchange(options, better, budget), key=options.total_loss)
    return options.position[best]


def _relax(options: Options, budget: int) -> tuple[Ints, Ints, float]:
    """The plans before and after the step that passes the budget, and the loss which that saves per cost."""
    item, cost, loss = options.item, options.cost, options.loss
    ends = np.append(options.first[1:], len(item))
    spans = [slice(*span) for span in zip(options.first, ends, strict=True)]
    corners = np.concatenate([span.start + _hull(cost[span], loss[span]) for span in spans])
    start, end = corners[:-1], corners[1:]
    start, end = start[item[start] == item[end]], end[item[start] == item[end]]
    spent = cost[end] - cost[start]
    rate = (loss[start] - loss[end]) / spent
    order = np.argsort(-rate, kind="stable")
    fitting = int(np.searchsorted(np.cumsum(spent[order]), budget - options.total_cost(options.first), "right"))
    before = options.first.copy()
    np.maximum.at(before, item[end[order[:fitting]]], end[order[:fitting]])
    after = before.copy()
    if fitting == len(order):
        return before, after, 0.0
    last = order[fitting]
    after[item[end[last]]] = end[last]
    return before, after, float(rate[last])


def _hull(cost: Ints, loss: Floats) -> Ints:
    """Indices of the corners of the lower convex hull, by rising cost: its slopes are those of an isotonic
    regression (Barlow 1972)."""
    if len(cost) < 3:
        return np.arange(len(cost))
    width = np.diff(cost)
    return isotonic_regression(np.diff(loss) / width, weights=width).blocks


def _exchange(options: Options, plan: Ints, budget: int) -> Ints:
    """Change one item's option as long as that saves loss, or brings the plan within the budget."""
    plan = plan.copy()
    while True:
        left = budget - options.total_cost(plan)
        fits = np.flatnonzero(options.cost <= (options.cost[plan] + left)[options.item])
        change = options.loss[fits] - options.loss[plan][options.item[fits]]
        if left >= 0 and change.min() >= 0:
            return plan
        found = fits[change.argmin()]
        plan[options.item[found]] = found


def _programme(options: Options, plan: Ints, core: Ints, reduced: Floats, rate: float, budget: int) -> Ints:
    """The best plan that differs from `plan` in the core only, or `plan`.

    A state is the change of cost and of loss so far. It is dropped where it cannot end within the budget, and
    where it cannot end below the plan's loss even if every item that follows takes the least of loss + w cost.
    """
    menus = np.split(core, np.flatnonzero(np.diff(options.item[core])) + 1)
    menus = [menu[_thin(options.cost[menu], reduced[menu], max(FEWEST, CORE // len(menus)))] for menu in menus]
    most_states = SUMS // sum(map(len, menus))
    now = plan[[options.item[menu[0]] for menu in menus]]
    costs = [options.cost[menu] - options.cost[at] for menu, at in zip(menus, now, strict=True)]
    losses = [options.loss[menu] - options.loss[at] for menu, at in zip(menus, now, strict=True)]
    lowest, highest = _following([c.min() for c in costs]), _following([c.max() for c in costs])
    regret = _following(reduced[now])
    left = budget - options.total_cost(plan)
    cost, loss, kept = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for i in range(len(menus)):
        cost, loss = np.add.outer(cost, costs[i]).ravel(), np.add.outer(loss, losses[i]).ravel()
        worth = loss + rate * cost
        hopeful = (cost + lowest[i] <= left) & (worth - regret[i] < rate * np.minimum(cost + highest[i], left))
        states = np.flatnonzero(hopeful)
        states = states[_undominated(cost[states], loss[states])]
        states = states[_thin(cost[states], worth[states], most_states)]
        cost, loss = cost[states], loss[states]
        kept.append(states)
    if not len(loss):
        return plan
    plan, at = plan.copy(), int(loss.argmin())
    for menu, states in zip(reversed(menus), reversed(kept), strict=True):
        at, choice = divmod(int(states[at]), len(menu))
        plan[options.item[menu[0]]] = menu[choice]
    return plan


def _following(values: Sequence[float] | Floats) -> Floats:
    """The sum [items] of those that follow each."""
    return np.append(np.cumsum(values[::-1])[::-1][1:], 0)


def _undominated(cost: Ints, loss: Floats) -> Ints:
    """Indices, by rising cost, of those with less loss than all that cost no more."""
    order = np.lexsort((loss, cost))
    before = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
    return order[loss[order] < before]


def _thin(cost: Ints, value: Floats, number: int) -> Ints:
    """Indices of at most `number`: all, or the least value in each of that many intervals of cost."""
    if len(cost) <= number:
        return np.arange(len(cost))
    interval = (cost - cost[0]) * number // (cost[-1] - cost[0] + 1)
    order = np.lexsort((value, interval))
    return order[np.flatnonzero(np.diff(interval[order], prepend=-1))]
