"""The arithmetic of budgets, and what is spent: the knapsack against all plans there are, filling and uniform by their laws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rankwise import RankwiseError
from rankwise.allocation.knapsack import RELATIVE_GAP, knapsack
from rankwise.allocation.plan import Budget, Ranks, Shapes, fill, parameters
from rankwise.allocation.problem import Problem
from rankwise.allocation.uniform import Uniform
from rankwise.layers.lowrank import FORMS
from rankwise.layers.matrices import Shape

many = settings(deadline=None)


@dataclass(frozen=True)
class Instance:
    """Prices of every component of a few small matrices, and a budget that they can meet."""

    shapes: dict[str, Shape]
    prices: dict[str, list[float]]
    budget: Budget

    def options(self, name: str) -> list[int | None]:
        multiple = self.budget.multiple
        return [*range(multiple, self.shapes[name].largest_rank(multiple) + 1, multiple), None]

    def loss(self, ranks: Ranks) -> float:
        return sum(max(p, 0.0) for n, r in ranks.items() if r is not None for p in self.prices[n][r:])

    @property
    def least_loss(self) -> float:
        plans = (dict(zip(self.shapes, plan, strict=True)) for plan in itertools.product(*map(self.options, self.shapes)))
        return min(self.loss(plan) for plan in plans if parameters(plan, self.shapes) <= self.budget.parameters)


@st.composite
def instances(draw: Any, largest: int = 12, matrices: int = 3) -> Instance:
    multiple = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = st.integers(2, largest)
    possible = st.builds(Shape, sizes, sizes).filter(lambda shape: shape.largest_rank(multiple) >= multiple)
    shapes = {f"matrix {i}": draw(possible) for i in range(draw(st.integers(1, matrices)))}
    price = st.one_of(st.floats(-1, 100), st.sampled_from([0.0, 1.0, 1e-12, 1e6]))
    prices = {n: draw(st.lists(price, min_size=s.full_rank, max_size=s.full_rank)) for n, s in shapes.items()}
    if draw(st.booleans()):
        prices = {n: sorted(p, reverse=True) for n, p in prices.items()}
    least = sum(s.parameters(multiple) for s in shapes.values())
    budget = Budget(draw(st.integers(least, sum(s.dense for s in shapes.values()))), multiple)
    return Instance(shapes, prices, budget)


WIDE_RANGE = Instance(  # a price that no good plan drops, a million times those that decide
    {"a": Shape(9, 12), "b": Shape(10, 12)},
    {"a": [0, 0, 0, 1e6, 0, 0, 0, 0, 1], "b": [0, 0, 0, 0, 0, 0, 0, 0, 0, 2]},
    Budget(219),
)


@many
@given(instances())
@example(WIDE_RANGE)
def test_knapsack_is_as_good_as_the_best_of_all_plans(instance: Instance) -> None:
    prices = {name: torch.tensor(values, dtype=torch.float64) for name, values in instance.prices.items()}
    ranks = knapsack(prices, instance.shapes, instance.budget)
    assert ranks.keys() == instance.shapes.keys()
    assert all(rank in instance.options(name) for name, rank in ranks.items())
    assert parameters(ranks, instance.shapes) <= instance.budget.parameters
    assert instance.loss(ranks) <= (1 + RELATIVE_GAP) * instance.least_loss + 1e-9


def test_knapsack_at_the_size_of_a_real_model_meets_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"matrix {i}": Shape(*((4096, 4096), (11008, 4096), (4096, 11008))[i % 3]) for i in range(48)}
    prices = {n: torch.rand(s.full_rank, generator=generator).sort(descending=True).values for n, s in shapes.items()}
    budget = Budget.of(shapes, 0.3, "linear", 0)
    left = budget.parameters - parameters(knapsack(prices, shapes, budget), shapes)
    assert 0 <= left < min(shape.per_rank for shape in shapes.values())


@given(instances(), st.randoms(use_true_random=False))
@many
def test_fill_spends_what_is_left_and_lowers_nothing(instance: Instance, random: Any) -> None:
    shapes, budget = instance.shapes, instance.budget
    before: Ranks = {name: random.choice(instance.options(name)) for name in shapes}
    assume(parameters(before, shapes) <= budget.parameters)
    after = fill(before, shapes, budget, random.sample(list(shapes), len(shapes)))
    left = budget.parameters - parameters(after, shapes)
    assert left >= 0
    for name in shapes:
        options = instance.options(name)
        at = options.index(after[name])
        assert at >= options.index(before[name])
        if at + 1 < len(options):
            assert shapes[name].parameters(options[at + 1]) - shapes[name].parameters(options[at]) > left


def test_fill_serves_the_first_in_order_first() -> None:
    shapes = {name: Shape(8, 8, form="pair") for name in "ab"}
    assert fill({"a": 1, "b": 1}, shapes, Budget(16 * 3), ["b", "a"]) == {"a": 1, "b": 2}


def test_fill_steps_from_the_largest_rank_to_dense() -> None:
    shape = Shape(8, 8, form="pair")
    assert shape.largest_rank() == 3  # break-even is 4
    assert fill({"a": 3}, {"a": shape}, Budget(64), ["a"]) == {"a": None}
    assert fill({"a": 3}, {"a": shape}, Budget(63), ["a"]) == {"a": 3}


rates = st.integers(1, 9999).map(lambda n: n / 10_000)
linear = st.dictionaries(
    st.text("ab", min_size=1),
    st.builds(Shape, st.integers(3, 500), st.integers(6, 500), st.just(0), st.sampled_from([*FORMS])),
    min_size=1,
)


@many
@given(linear, rates, st.sampled_from(["linear", "model"]), st.integers(0, 100_000))
@example({"a": Shape(10, 10)}, 0.07, "linear", 0)  # 0.07 * 100 > 7 in floating point
@example({"a": Shape(40, 50)}, 0.9, "linear", 0)  # (1 - 0.9) * 2000 < 200
@example({"a": Shape(17, 13)}, 0.99, "linear", 0)  # 0.86425 can be reached, 0.8643 cannot
def test_a_budget_removes_the_rate_to_the_parameter(shapes: Shapes, rate: float, scope: str, others: int) -> None:
    dense = sum(shape.dense for shape in shapes.values())
    total = dense if scope == "linear" else dense + others
    least = sum(shape.parameters(1) for shape in shapes.values())
    wanted = Fraction(str(rate)) * total
    assume(wanted >= 1)
    if dense - wanted < least:
        with pytest.raises(RankwiseError, match="ask for at most") as error:
            Budget.of(shapes, rate, scope, dense + others)
        reachable = float(str(error.value).split()[-1])
        assert reachable < rate
        if reachable:
            assert Budget.of(shapes, reachable, scope, dense + others).parameters >= least
    else:
        assert wanted <= dense - Budget.of(shapes, rate, scope, dense + others).parameters < wanted + 1


def test_a_rate_below_one_parameter_removes_nothing() -> None:
    assert Budget.of({"a": Shape(10, 10)}, 0.009, "linear", 0).parameters == 100
    assert Budget.of({"a": Shape(10, 10)}, 0.01, "linear", 0).parameters == 99


def test_the_multiple_counts_in_what_can_be_reached() -> None:
    shapes = {"a": Shape(32, 32)}
    assert Budget.of(shapes, 0.5, "linear", 0, multiple=8) == Budget(512, 8)
    with pytest.raises(RankwiseError, match=r"rank 8 .* at most 0\.5625"):
        Budget.of(shapes, 0.563, "linear", 0, multiple=8)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(RankwiseError, match="between 0 and 1"):
        Budget.of({"a": Shape(10, 10)}, rate, "linear", 0)


@many
@given(instances(largest=40, matrices=6))
def test_uniform_takes_the_same_fraction_of_every_matrix(instance: Instance) -> None:
    shapes, budget = instance.shapes, instance.budget
    spectra = {name: torch.ones(shape.full_rank) for name, shape in shapes.items()}
    ranks = Uniform().allocate(Problem(shapes, spectra, budget, student=None)).ranks  # type: ignore[arg-type]
    total = parameters(dict.fromkeys(shapes), shapes)
    left = budget.parameters - parameters(ranks, shapes)
    assert left >= 0
    assert all(r is None for r in ranks.values()) or left < budget.multiple * max(s.per_rank for s in shapes.values())
    assert all(rank in instance.options(name) for name, rank in ranks.items())
    exact = {n: Fraction(budget.parameters * s.dense, total * s.per_rank) for n, s in shapes.items()}
    if all(e >= budget.multiple for e in exact.values()):  # else the smallest rank of one costs the others
        for name, rank in ranks.items():
            assert rank is None or rank > exact[name] - budget.multiple
