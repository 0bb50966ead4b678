"""Whitening on both sides: the Fisher information of W taken as G (x) H (KFAC, Martens and Grosse 2015), as in KFAC-SVD
(LEMS, 2026) and GFWSVD: dropping a component costs what it does to the outputs and what the outputs do to the loss."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"second", "output"})
INPUT_DAMPING = 1e-4
OUTPUT_DAMPING = 1e-2


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the mean of g g^T over tokens [m, m] and of H [n, n], damped relative to their mean diagonals."""
    assert moments.second is not None
    assert moments.output is not None
    return Root.of(moments.output.double(), OUTPUT_DAMPING, moments.count), Root.of(moments.second, INPUT_DAMPING)
