"""What a set of measured points answers: how far it pays to go, what so much quality takes, what so many bytes cost.

A point is a mapping with its `series`, `kl` (nats per token), `bytes`, `share` (of the original's bytes) and `speedup` (of decoding,
None where it is not known). The first point is the original. Answers name points by their index. Nothing is interpolated: every
answer was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Points = Sequence[Mapping[str, Any]]
KL_MARKS = (0.01, 0.03, 0.1, 0.3, 1.0)


def answers(points: Points) -> dict[str, Any]:
    """All of them, for JSON.

    knees: of each series (see `knee`). under: for each of `KL_MARKS` the smallest point of each series that costs no more.
    within: at the smallest size of each series, the best point of each that is no larger. cheapest_byte: the point that costs
    the least per byte it saves; cheapest_speed: per speed-up, None where no point is faster.
    """
    series = {name: [0, *_of(points, name)] for name in dict.fromkeys(p["series"] for p in points[1:])}
    sizes = sorted({min(points[i]["bytes"] for i in indices) for indices in series.values()}, reverse=True)
    smaller = [i for i, point in enumerate(points) if point["share"] < 1]
    faster = [i for i, point in enumerate(points) if (point["speedup"] or 0) > 1]
    return {
        "knees": {name: knee(points, indices) for name, indices in series.items()},
        "under": [{"kl": kl, "points": _each(series, lambda of: smallest(points, of, kl))} for kl in KL_MARKS],  # noqa: B023
        "within": [{"bytes": size, "points": _each(series, lambda of: best(points, of, size))} for size in sizes],  # noqa: B023
        "cheapest_byte": min(smaller, key=lambda i: cost(points[i]) / (1 - points[i]["share"]), default=None),
        "cheapest_speed": min(faster, key=lambda i: cost(points[i]) / (points[i]["speedup"] - 1), default=None),
    }


def knee(points: Points, indices: Iterable[int]) -> int:
    """The point of least KL + share of the bytes, that is, the last before the next per cent of the bytes costs more than a per
    cent of perplexity (0.01 nats per token).

    A price that a user can hold their own against, and one for all curves: that of most distance to the chord, the usual knee,
    moves with the last point that was measured, and on a logarithmic axis it is where the curve flattens, not where it becomes
    dear.
    """
    return min(indices, key=lambda i: cost(points[i]) + points[i]["share"])


def smallest(points: Points, indices: Iterable[int], kl: float) -> int | None:
    """The point of fewest bytes that costs at most `kl`."""
    return min((i for i in indices if cost(points[i]) <= kl), key=lambda i: points[i]["bytes"], default=None)


def best(points: Points, indices: Iterable[int], size: int) -> int | None:
    """The point that costs least of those of at most `size` bytes."""
    return min((i for i in indices if points[i]["bytes"] <= size), key=lambda i: cost(points[i]), default=None)


def cost(point: Mapping[str, Any]) -> float:
    """Its KL, infinite where it could not be measured."""
    return point["kl"] if point["kl"] is not None and not math.isnan(point["kl"]) else math.inf


def _of(points: Points, series: str) -> list[int]:
    return [i for i, point in enumerate(points) if point["series"] == series]


def _each(series: Mapping[str, list[int]], answer: Any) -> dict[str, int | None]:
    return {name: answer(indices) for name, indices in series.items()}
