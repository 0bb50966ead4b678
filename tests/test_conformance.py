"""Every metric and every allocator that is registered obeys the laws; a new one is covered by its line of registration."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.allocation.allocator import ALLOCATORS, allocator_named
from rankwise.decomposition.metric import METRICS
from rankwise.testing.allocators import ALLOCATOR_LAWS, tiny_problem
from rankwise.testing.metrics import CASES, METRIC_LAWS, tiny_matrix

QUICK: dict[tuple[str, str], dict[str, Any]] = {  # options that make an allocator quick
    ("llrc", "default"): {"rounds": 1, "value_steps": 2},
    ("llrc", "paper"): {"max_steps": 12, "steps_after_target": 2},
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
