"""Times of alternatives, side by side: on a machine that other work shares, only what ran at the same moment compares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def alternating(tasks: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds [task][repeat] of each task, run in turn, after one turn that warms up."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for turn in range(repeats + 1):
        for task, own in zip(tasks, seconds, strict=True):
            since = _now()
            task()
            if turn:
                own.append(_now() - since)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
