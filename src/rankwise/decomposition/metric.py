"""What a metric is, and the list of those there are. A new metric is one file and one line in `METRICS`."""

from __future__ import annotations

from typing import Protocol

from rankwise.calibration.moments import Moments
from rankwise.decomposition import activation, fisher, kronecker, svd, whitened
from rankwise.decomposition.solver import Root
from rankwise.errors import RankwiseError


class Metric(Protocol):
    """A module with the moments it needs and the roots it makes of them."""

    NEEDS: frozenset[str]

    def roots(self, moments: Moments) -> tuple[Root | None, Root | None]:
        """The roots of the metric on outputs [m, m] and on inputs [n, n]; None is the identity."""
        ...


METRICS: dict[str, Metric] = {
    "svd": svd,
    "activation": activation,
    "fisher": fisher,
    "whitened": whitened,
    "kronecker": kronecker,
}


def metric_named(name: str) -> Metric:
    """Raises `RankwiseError` for an unknown name."""
    if name not in METRICS:
        raise RankwiseError(f"unknown decomposition {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
