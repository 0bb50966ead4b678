"""Whitening by the inputs' second moment H: the error is that of the outputs, ||X (W - W')^T|| (SVD-LLM, Wang et al. 2024,
arXiv 2403.07378; same optimum as its V2, 2503.12340, and as DRONE)."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"input"})
DAMPING = 1e-8  # of diag(H), as one feature's outliers would rule its mean: only orders the directions that no token has


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """Identity on outputs; the root of H [n, n] on inputs."""
    H = moments.input
    assert H is not None
    return None, Root((DAMPING * H.diagonal()).sqrt(), H)
