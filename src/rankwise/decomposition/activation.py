"""ASVD: input feature j counts by (mean |x_j|)^alpha, alpha = 0.5 (Yuan et al. 2023, arXiv 2312.05821)."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"absolute"})
ALPHA = 0.5
FLOOR = 1e-6  # as the paper's code: a feature never seen still has a scale


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """Identity on outputs; diag((mean |x_j| + 1e-6)^alpha) [n] on inputs."""
    assert moments.absolute is not None
    return None, Root((moments.absolute / moments.count + FLOOR) ** ALPHA)
