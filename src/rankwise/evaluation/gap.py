"""What the compression costs on other text than the first, which is like the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rankwise.evaluation.intervals import Interval, of_difference


def gaps(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every text's figures, and under "gap" how much more the compression costs there than on the first text, nats per token:
    in KL, and in negative log likelihood (ln of the perplexity ratio). Where the first is like the calibration text, this is
    what calibration has hidden. With intervals; None on the first text.
    """
    first = next(iter(measured.values()))
    return {name: {**found, "gap": None if found is first else _gap(found, first)} for name, found in measured.items()}


def _gap(found: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    gap: dict[str, Any] = {"kl": found["kl"] - first["kl"], "intervals": {}}
    of_kl = (found["intervals"]["kl"], first["intervals"]["kl"])
    gap["intervals"]["kl"] = of_difference(found["kl"], of_kl[0], first["kl"], of_kl[1])
    if found["perplexity_ratio"] is not None:
        (a, of_a), (b, of_b) = (_log_ratio(part) for part in (found, first))
        gap["log_perplexity"], gap["intervals"]["log_perplexity"] = a - b, of_difference(a, of_a, b, of_b)
    return gap


def _log_ratio(figures: Mapping[str, Any]) -> tuple[float, Interval | None]:
    interval = figures["intervals"]["perplexity_ratio"]
    return math.log(figures["perplexity_ratio"]), None if interval is None else [math.log(bound) for bound in interval]
