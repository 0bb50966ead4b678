"""Whitening on both sides about the mean input: `kronecker` with the affine factors of `centred`."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.kronecker import INPUT_DAMPING, damped_root, output_root
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"total", "input", "output"})


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the mean of g g^T over tokens [m, m] and of the inputs' covariance [n, n], damped as there."""
    return output_root(moments), damped_root(moments.covariance, INPUT_DAMPING, moments.count)
