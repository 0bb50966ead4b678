"""FWSVD: input feature j counts by the root of its column's Fisher information (Hsu et al. 2022, arXiv 2207.00112).

The paper ties the element weights E[(dL/dW_ij)^2] over the outputs i to have a closed form; gradients are per sequence.
"""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root

NEEDS = frozenset({"fisher"})
FLOOR = 1e-6  # of the mean: a feature without a gradient still has a scale


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """Identity on outputs; diag(sqrt(sum_i E[(dL/dW_ij)^2])) [n] on inputs."""
    assert moments.fisher is not None
    scale = moments.fisher.sqrt()
    return None, Root(scale + FLOOR * scale.mean().clamp_min(FLOOR))
