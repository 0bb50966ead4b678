"""Whitening on both sides: the Fisher information of W taken as G (x) H (KFAC, Martens and Grosse 2015), as in KFAC-SVD
(LEMS, 2026) and GFWSVD: dropping a component costs what it does to the outputs and what the outputs do to the loss."""

from __future__ import annotations

from torch import Tensor

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root
from rankwise.layers.precision import exact

NEEDS = frozenset({"input", "output"})
INPUT_DAMPING = 1e-4
OUTPUT_DAMPING = 1e-2
SAMPLING = 3.0  # times features over tokens: how far a moment of few tokens is from that of all text (Ledoit and Wolf 2004)


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """The roots of the mean of g g^T over tokens [m, m] and of H [n, n], damped relative to their diagonals: the less text, the
    more."""
    return output_root(moments), input_root(moments)


def input_root(moments: Moments) -> Root:
    """The root of H [n, n]."""
    assert moments.input is not None
    return damped_root(moments.input, INPUT_DAMPING, moments.count)


def output_root(moments: Moments) -> Root:
    """The root of the mean of g g^T over tokens [m, m]."""
    assert moments.output is not None
    return damped_root(exact(moments.output), OUTPUT_DAMPING, moments.count, moments.count)


def damped_root(total: Tensor, damping: float, tokens: int, count: int = 1) -> Root:
    """The root of `total` [d, d] / `count`, a moment of so many tokens: `damping` of its mean is added to its diagonal, and what
    sampling leaves uncertain of each feature to its own place there, as features differ in scale by orders."""
    return Root.of(total, damping, count, SAMPLING * len(total) / tokens)
