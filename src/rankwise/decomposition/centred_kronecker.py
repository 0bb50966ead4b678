"""Whitening on both sides about the mean input: `kronecker` with the affine factors of `centred`."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.kronecker import INPUT_DAMPING, damping, output_root
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"total", "input", "output"})


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the mean of g g^T over tokens [m, m] and of the inputs' covariance [n, n], damped as there."""
    covariance = moments.covariance
    return output_root(moments), Root.of(covariance, damping(INPUT_DAMPING, covariance, moments.count))
