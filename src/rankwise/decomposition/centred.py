"""PCA of the outputs about their mean, with the bias that keeps it: Atomic Feature Mimicking (Yu and Wu, AAAI 2023).

    y ~ U_r U_r^T (y - mu) + mu,  Cov(y) = W Cov(x) W^T = U S^2 U^T

About zero instead of the mean, as LoRD does (Kaushal et al. 2023, arXiv 2309.14021), it is the whitened metric.
"""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root
from rankwise.decomposition.whitened import DAMPING

NEEDS = frozenset({"total", "input"})


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """Identity on outputs; the root of the inputs' covariance [n, n]."""
    C = moments.covariance
    return None, Root((DAMPING * C.diagonal().clamp_min(0)).sqrt(), C)
