"""Trained counts of components, all multiplied by one factor to meet the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import by_threshold


def proportional(problem: Problem, counts: Mapping[str, float], history: list[dict[str, Any]]) -> Allocation:
    """The first s * count components of every matrix, for the largest s that the budget has room for.

    Component i = 1, 2, ... scores count / i: above the threshold 1 / s lie the first s * count.
    """
    scores = {n: counts[n] / torch.arange(1, len(s) + 1, dtype=torch.float64) for n, s in problem.spectra.items()}
    return replace(by_threshold(problem, scores), history=history)
