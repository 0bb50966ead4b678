"""Whitening on both sides about the mean input: `kronecker` with the affine factors of `centred`."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.kronecker import INPUT_DAMPING, OUTPUT_DAMPING
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"first", "second", "output"})


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the mean of g g^T over tokens [m, m] and of the inputs' covariance [n, n], damped as there."""
    assert moments.output is not None
    return Root.of(moments.output.double(), OUTPUT_DAMPING, moments.count), Root.of(moments.covariance, INPUT_DAMPING)
