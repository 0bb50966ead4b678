"""What a metric is, and the list of those there are. A new metric is one file and one line in `METRICS`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rankwise.calibration.moments import Moments
from rankwise.decomposition import activation, centred, centred_kronecker, fisher, kronecker, svd, whitened
from rankwise.decomposition.solver import Decomposition, Root, decompose
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
    "centred": centred,
    "centred-kronecker": centred_kronecker,
}


def is_affine(metric: Metric) -> bool:
    """Whether its factors keep the mean output in a bias: so where it needs the mean input."""
    return "total" in metric.NEEDS


def orders_neurons(metric: Metric) -> bool:
    """Whether what neurons are to their MLP can be measured in it (`rankwise.slicing`)."""
    return "input" in metric.NEEDS and not is_affine(metric)


def decompose_in(metric: Metric, W: Tensor, moments: Moments) -> Decomposition:
    """`decompose` of W [m, n] in the metric, affine where it is."""
    return decompose(W, *metric.roots(moments), moments.mean if is_affine(metric) else None)


def metric_named(name: str) -> Metric:
    """Raises `RankwiseError` for an unknown name."""
    if name not in METRICS:
        raise RankwiseError(f"unknown decomposition {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
