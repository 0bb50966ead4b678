"""The multiple-choice knapsack against all plans there are; where these are too many, the Lagrangian bound."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwise.allocation.multiple_choice import CORE, solve

GAP = 1e-3
Instance = tuple[list[Any], list[Any], int]  # costs and losses of each item's options; budget


@st.composite
def instances(draw: Any) -> Instance:
    """Options in any order, with ties, equal costs and useless ones among them."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    loss = st.one_of(st.floats(0, 100), st.sampled_from([0.0, 1.0, 2.0, 1e6]))
    costs = [np.array(draw(st.lists(st.integers(0, 60), min_size=n, max_size=n))) for n in sizes]
    losses = [np.array(draw(st.lists(loss, min_size=n, max_size=n))) for n in sizes]
    least, most = sum(int(c.min()) for c in costs), sum(int(c.max()) for c in costs)
    return costs, losses, draw(st.integers(least, most))


def totals(plan: Any, costs: list[Any], losses: list[Any]) -> tuple[int, float]:
    """Cost and loss of the plan."""
    return sum(int(c[at]) for c, at in zip(costs, plan, strict=True)), sum(v[at] for v, at in zip(losses, plan, strict=True))


def bound(costs: list[Any], losses: list[Any], budget: int) -> float:
    """What every plan loses at least: the best Lagrangian bound of a bisection; each of them holds."""
    low, high, best = 0.0, 1e6, 0.0
    for _ in range(200):
        rate = (low * high) ** 0.5 if low else high / 2
        reduced = [loss + rate * cost for cost, loss in zip(costs, losses, strict=True)]
        best = max(best, sum(r.min() for r in reduced) - rate * budget)
        over = sum(int(c[r.argmin()]) for c, r in zip(costs, reduced, strict=True)) > budget
        low, high = (rate, high) if over else (low, rate)
    return best


ON_THE_EDGE: Instance = (  # one option is as far above its item's least as the plan is above the bound
    [np.array([0, 4, 17]), np.array([0, 11, 12]), np.array([0, 4, 7])],
    [np.array([7.8, 1.4, 0.0]), np.array([7.4, 2.2, 0.0]), np.array([8.8, 2.4, 0.0])],
    19,
)


FROM_ONE_THAT_GIVES_WAY: Instance = (  # the best plan takes back an exchange
    [np.array([0, cost]) for cost in (1, 9, 6, 12, 19)],
    [np.array([loss, 0.0]) for loss in (7.5, 3.3, 1.3, 4.2, 9.5)],
    16,
)


@settings(max_examples=2 * settings().max_examples, deadline=None)
@given(instances())
@example(ON_THE_EDGE)
@example(FROM_ONE_THAT_GIVES_WAY)
def test_a_small_one_is_solved_exactly(instance: Instance) -> None:
    costs, losses, budget = instance
    plans = itertools.product(*(range(len(cost)) for cost in costs))
    least = min(loss for cost, loss in (totals(plan, costs, losses) for plan in plans) if cost <= budget)
    cost, loss = totals(solve(costs, losses, budget, GAP), costs, losses)
    assert cost <= budget
    assert loss <= least * (1 + 1e-12) + 1e-9


def curves(items: int, options: int, kind: str, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """As of matrices: every rank costs the same; the last option is dense, one step above half the components."""
    generator = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(items):
        per_rank = int(generator.integers(1_000, 4_000)) if kind != "the same" else 2_000
        prices = {
            "power law": generator.lognormal() * np.arange(1, 2 * options) ** -generator.uniform(0.5, 2),
            "in no order": generator.random(2 * options - 1),
            "the same": 1 / np.arange(1, 2 * options),
        }[kind]
        tail = np.cumsum(prices[::-1])[::-1]
        costs.append(np.append(np.arange(1, options), options) * per_rank)
        losses.append(np.append(tail[1:options], 0.0))
    return costs, losses


@pytest.mark.parametrize("kind", ["power law", "the same"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("tolerance", [0.0, GAP])
def test_a_large_one_is_within_the_tolerance_of_the_bound(kind: str, part: float, tolerance: float) -> None:
    costs, losses = curves(150, 800, kind)
    budget = int(part * sum(int(cost[-1]) for cost in costs))
    plan = solve(costs, losses, budget, tolerance)
    cost, loss = totals(plan, costs, losses)
    assert cost <= budget
    assert bound(costs, losses, budget) * (1 - 1e-9) <= loss <= (1 + GAP) * bound(costs, losses, budget)
    assert plan.tolist() == solve(costs, losses, budget, tolerance).tolist()


def test_what_one_exchange_cannot_mend_is_mended() -> None:
    """Three items of cost 6 and four of 4, in 15: sixes save more per cost, a six and two fours are best."""
    costs = [np.array([0, 6])] * 3 + [np.array([0, 4])] * 4
    losses = [np.array([6.3, 0.0])] * 3 + [np.array([4.1, 0.0])] * 4
    plan = solve(costs, losses, 15, GAP)
    assert (sum(plan[:3]), sum(plan[3:])) == (1, 2)


def test_beyond_the_largest_core_the_budget_is_met_and_no_loss_is_added() -> None:
    costs, losses = curves(6, 4 * CORE, "in no order")
    budget = sum(int(cost[-1]) for cost in costs) - int(costs[0][-1]) // 3
    cost, loss = totals(solve(costs, losses, budget, 0.0), costs, losses)
    alone = [losses[i][cost <= cost[-1] - sum(int(c[-1]) for c in costs) + budget].min() for i, cost in enumerate(costs)]
    assert cost <= budget
    assert loss <= min(alone) * (1 + 1e-12)


def test_the_cheapest_where_the_budget_is_less() -> None:
    assert solve([np.array([3, 1]), np.array([2])], [np.array([0.0, 5.0]), np.array([1.0])], 2, GAP).tolist() == [1, 0]
