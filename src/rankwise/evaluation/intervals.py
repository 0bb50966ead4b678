"""Intervals [low, high] that hold the true value 95 times in 100, beside every figure that a sample gives.

Windows and items are taken as drawn at random and independent. Windows of one book are less independent than that: read an
interval as the least uncertainty there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95
Interval = list[float]


def of_ratio(sums: Tensor, counts: Tensor) -> Interval | None:
    """Of sum(sums) / sum(counts), a mean over tokens that come in windows; both [windows]. None for a single window.

    The ratio estimator's standard error with windows as clusters (Cochran 1977, section 2.11),
    s^2 = W / (W - 1) sum_w (x_w - r c_w)^2 / (sum_w c_w)^2, and Student's t with W - 1 degrees of freedom.
    """
    windows = len(sums)
    if windows < 2:
        return None
    total = counts.double().sum()
    ratio = (sums.double().sum() / total).item()
    residuals = sums.double() - ratio * counts.double()
    error = (windows / (windows - 1) * residuals.square().sum()).sqrt().item() / total.item()
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, windows - 1)) * error
    return [ratio - half, ratio + half]


def of_proportion(successes: int, items: int) -> Interval:
    """Of successes / items (Wilson 1927): never empty, not even at 0 or 1."""
    found = stats.binomtest(successes, items).proportion_ci(CONFIDENCE, method="wilson")
    return [float(found.low), float(found.high)]


def of_paired_difference(lost: int, won: int, items: int) -> Interval:
    """Of (won - lost) / items, where the same items were answered twice (Agresti and Min 2005): half an item is added to each of
    the four cells, so that no flip among few items is not taken for certainty."""
    lost_, won_, n = lost + 0.5, won + 0.5, items + 2
    centre = (won_ - lost_) / n
    error = math.sqrt(won_ + lost_ - (won_ - lost_) ** 2 / n) / n
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return [max(-1.0, centre - half), min(1.0, centre + half)]


def of_difference(a: float, of_a: Interval | None, b: float, of_b: Interval | None) -> Interval | None:
    """Of a - b for two independent samples, from the interval of each (Zou and Donner 2008)."""
    if of_a is None or of_b is None:
        return None
    low = math.hypot(a - of_a[0], of_b[1] - b)
    high = math.hypot(of_a[1] - a, b - of_b[0])
    return [a - b - low, a - b + high]


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p value that as many items are won as lost (McNemar 1947)."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def clipped(interval: Interval | None, bounds: Sequence[float]) -> Interval | None:
    """The interval without the values that cannot be."""
    return None if interval is None else [max(bounds[0], interval[0]), min(bounds[1], interval[1])]
