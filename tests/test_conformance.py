"""Every metric and every allocator that is registered obeys the laws; a new one is covered by its line of registration.
And the laws can be broken: each by something made to break it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from rankwise.allocation.allocator import ALLOCATORS, allocator_named
from rankwise.allocation.plan import Budget, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.uniform import Uniform
from rankwise.calibration.moments import Moments
from rankwise.decomposition.metric import METRICS
from rankwise.decomposition.solver import Root
from rankwise.testing import allocators as allocator_laws
from rankwise.testing import metrics as metric_laws
from rankwise.testing.allocators import ALLOCATOR_LAWS, tiny_problem
from rankwise.testing.metrics import CASES, METRIC_LAWS, tiny_matrix

QUICK: dict[tuple[str, str], dict[str, Any]] = {  # options that make an allocator quick
    ("llrc", "default"): {"points": 0, "rounds": 1, "value_steps": 2},
    ("llrc", "paper"): {"max_steps": 12, "steps_after_target": 2},
    ("ars", "default"): {"steps": 8},
    ("ara", "default"): {"steps": 8},
    ("dobi", "default"): {"steps": 8},
    ("strs", "default"): {"rates": (0.2, 0.5, 0.8), "sequences": 4},
    ("kl-knapsack", "default"): {"trials": 3},
    ("evolutionary", "default"): {"generations": 2, "offspring": 3, "survivors": (2, 1), "tokens": 128},
}
PRESETS = [(name, preset) for name, presets in ALLOCATORS.items() for preset in presets]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("law", METRIC_LAWS)
@pytest.mark.parametrize("metric", METRICS)
def test_metric(metric: str, law: Any, case: Any) -> None:
    law(METRICS[metric], *tiny_matrix(case))


@pytest.mark.parametrize("law", ALLOCATOR_LAWS)
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_allocator(name: str, preset: str, law: Any) -> None:
    law(allocator_named(name, preset, QUICK.get((name, preset), {})), tiny_problem)


@pytest.mark.parametrize("law", [allocator_laws.budget_is_met, allocator_laws.room_for_all_keeps_all])
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_allocator_pays_for_the_biases_of_affine_factors(name: str, preset: str, law: Any) -> None:
    allocator = allocator_named(name, preset, QUICK.get((name, preset), {}))
    law(allocator, lambda metric, rate, multiple: tiny_problem("centred", rate, multiple))


def test_every_quick_allocator_is_there() -> None:
    assert QUICK.keys() <= set(PRESETS)


Roots = Callable[[Moments], tuple[Root | None, Root | None]]
BREAKING_METRICS: dict[Any, Roots] = {  # law -> roots that break it
    metric_laws.full_rank_is_exact: lambda m: (Root(torch.zeros(len(of(m.output)), dtype=torch.float64)), None),
    metric_laws.spectrum_descends: lambda m: (None, Root(torch.zeros(len(of(m.input)), dtype=torch.float64))),
    metric_laws.error_is_the_tail: lambda m: (None, Root(torch.ones(len(of(m.input)), dtype=torch.float64), -of(m.input))),
    metric_laws.components_are_orthogonal: lambda m: (None, Root(torch.zeros(len(of(m.input)), dtype=torch.float64), skewed(m))),
    metric_laws.affine_keeps_the_mean: lambda m: (Root(torch.zeros(len(of(m.output)), dtype=torch.float64)), None),
    metric_laws.same_twice: lambda m: (None, Root(torch.rand(len(of(m.input)), dtype=torch.float64))),
    metric_laws.scale_is_free: lambda m: (Root(of(m.output).diagonal() + 100), None),
}


def of(moment: torch.Tensor | None) -> torch.Tensor:
    assert moment is not None
    return moment


def skewed(moments: Moments) -> torch.Tensor:
    """Not symmetric, so no metric."""
    return of(moments.input).tril()


@pytest.mark.parametrize("law", METRIC_LAWS)
def test_a_metric_that_breaks_a_law_is_found_out(law: Any) -> None:
    broken: Any = SimpleNamespace(NEEDS=frozenset({"total", "input", "absolute", "output"}), roots=BREAKING_METRICS[law])
    with pytest.raises(AssertionError):
        law(broken, *tiny_matrix(CASES["tall"]))


@dataclass(frozen=True)
class Broken:
    """Uniform, with another problem and another answer."""

    problem: Callable[[Problem], Problem] = lambda problem: problem
    answer: Callable[[Problem, Allocation], Allocation] = lambda _, answer: answer
    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        return self.answer(problem, Uniform().allocate(self.problem(problem)))


def dense_parameters(problem: Problem) -> int:
    return parameters(dict.fromkeys(problem.shapes), problem.shapes)


def with_budget(change: Callable[[Problem], int]) -> Broken:
    return Broken(problem=lambda p: replace(p, budget=Budget(change(p), p.budget.multiple)))


def touch(problem: Problem, answer: Allocation) -> Allocation:
    next(problem.student.model.parameters()).data += 1
    return answer


def least(problem: Problem) -> int:
    return sum(shape.parameters(problem.budget.multiple) for shape in problem.shapes.values())


CALLS = itertools.count()
BREAKING_ALLOCATORS: list[tuple[Any, Broken]] = [
    (allocator_laws.budget_is_met, with_budget(lambda p: p.budget.parameters + 1000)),  # too much
    (allocator_laws.budget_is_met, with_budget(lambda p: max(p.budget.parameters - 1000, least(p)))),  # too little
    (allocator_laws.budget_is_met, Broken(problem=lambda p: replace(p, budget=Budget(p.budget.parameters)))),  # no multiples
    (allocator_laws.masks_fit_the_ranks, Broken(answer=lambda p, a: replace(a, masks=dict.fromkeys(a.masks)))),
    (allocator_laws.larger_budgets_serve_better, with_budget(lambda p: dense_parameters(p) - p.budget.parameters + least(p))),
    (allocator_laws.same_seed_same_answer, with_budget(lambda p: p.budget.parameters - 500 * next(CALLS))),
    (allocator_laws.room_for_all_keeps_all, with_budget(lambda p: p.budget.parameters - 1)),
    (allocator_laws.smallest_budget_is_reached, with_budget(lambda p: 2 * p.budget.parameters)),
    (allocator_laws.model_is_left_alone, Broken(answer=touch)),
]


@pytest.mark.parametrize(("law", "broken"), BREAKING_ALLOCATORS)
def test_an_allocator_that_breaks_a_law_is_found_out(law: Any, broken: Broken) -> None:
    with pytest.raises(AssertionError):
        law(broken, lambda *asked: copy.deepcopy(tiny_problem(*asked)))


def test_every_law_can_be_broken() -> None:
    assert {law for law, _ in BREAKING_ALLOCATORS} == set(ALLOCATOR_LAWS)
    assert set(BREAKING_METRICS) == set(METRIC_LAWS)
