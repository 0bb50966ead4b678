"""What a set of measured points answers: how far it pays to go, what so much quality takes, what a size buys.

A point is a mapping with the `curves` that it is on, `kl` (nats per token), `bytes`, `share` (of the
original's bytes), `speedup` (of decoding, None where it is not known) and the `command` that makes it (None
where none does). The first point is the original, where every curve begins. Answers name points by their
index. Nothing is interpolated: every answer was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Points = Sequence[Mapping[str, Any]]
ABOUT = 1.005  # plans of the same bits differ by less than this
KL_MARKS = (0.01, 0.03, 0.1, 0.3, 1.0)


def answers(points: Points) -> dict[str, Any]:
    """All of them, for JSON.

    knees: of each curve (see `knee`); best_knee: of all points that a command makes. smallest: of each curve.
    under: for each of `KL_MARKS` the smallest point of each curve that costs no more. within: at the size of
    the best knee and of each smallest point, the best point of each curve that is no larger. cheapest_byte:
    the point that costs least per byte saved; cheapest_speed: per speed-up; None where none saves or is
    faster.
    """
    curves = curves_of(points)
    least = {name: min(of, key=lambda i: points[i]["bytes"]) for name, of in curves.items()}
    best_knee = knee(points, [0, *(i for i, point in enumerate(points) if point["command"])])
    saved = {i: 1 - point["share"] for i, point in enumerate(points) if point["share"] < 1}
    gained = {i: point["speedup"] - 1 for i, point in enumerate(points) if (point["speedup"] or 0) > 1}

    def under(kl: float) -> dict[str, int | None]:
        return {name: smallest(points, of, kl) for name, of in curves.items()}

    def within(size: int) -> dict[str, int | None]:
        return {name: best(points, of, size) for name, of in curves.items()}

    return {
        "knees": {name: knee(points, of) for name, of in curves.items()},
        "best_knee": best_knee,
        "smallest": least,
        "under": [{"kl": kl, "points": under(kl)} for kl in KL_MARKS],
        "within": [
            {"bytes": size, "points": within(size)}
            for size in sorted({points[i]["bytes"] for i in (best_knee, *least.values())}, reverse=True)
        ],
        "cheapest_byte": min(saved, key=lambda i: cost(points[i]) / saved[i], default=None),
        "cheapest_speed": min(gained, key=lambda i: cost(points[i]) / gained[i], default=None),
    }


def curves_of(points: Points) -> dict[str, list[int]]:
    """The points of each curve, the original first."""
    curves: dict[str, list[int]] = {}
    for i, point in enumerate(points[1:], start=1):
        for name in point["curves"]:
            curves.setdefault(name, [0]).append(i)
    return curves


def knee(points: Points, indices: Iterable[int]) -> int:
    """The point of least KL + share of the bytes: the last before the next per cent of the bytes costs more
    than a per cent of perplexity, 0.01 nats per token.

    That is a price which a user can hold their own against, and one for all curves. The point farthest from
    the chord, the usual knee, moves with the last point that was measured; on a logarithmic axis it is where
    a curve flattens, which is long after it became dear.
    """
    return min(indices, key=lambda i: cost(points[i]) + points[i]["share"])


def smallest(points: Points, indices: Iterable[int], kl: float) -> int | None:
    """The point of fewest bytes that costs at most `kl`."""
    good = [i for i in indices if cost(points[i]) <= kl]
    return min(good, key=lambda i: points[i]["bytes"], default=None)


def best(points: Points, indices: Iterable[int], size: int) -> int | None:
    """The point that costs least of those of about `size` bytes and of fewer."""
    small = [i for i in indices if points[i]["bytes"] <= ABOUT * size]
    return min(small, key=lambda i: cost(points[i]), default=None)


def cost(point: Mapping[str, Any]) -> float:
    """Its KL, infinite where it could not be measured."""
    return math.inf if point["kl"] is None or math.isnan(point["kl"]) else float(point["kl"])
