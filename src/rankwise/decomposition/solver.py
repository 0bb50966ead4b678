"""One solver for every metric.

Legend: W [m, n] the weight, R R^T the metric on outputs [m, m], L L^T the metric on inputs [n, n], k = min(m, n).
The best rank-r approximation in the norm ||R^T (W - W') L|| is (Eckart-Young, with M = R^T W L = U S V^T)

    W'_r = R^-T U_r U_r^T R^T W        B = R^-T U   [m, k]        A = U^T R^T W   [k, n]

so that B[:, :r] A[:r] is the rank-r model for every r, the error of dropping component i is exactly S_i^2, and L is never
inverted: a singular H is normal.

Affine factors (AFM, Yu and Wu 2023) keep the mean output whatever is dropped: with mu = E[x] and c = A mu, a dropped component
leaves its mean B_i c_i in the bias. L L^T is then the covariance of x, not its second moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import RankwiseError


@dataclass(frozen=True)
class Root:
    """A square root Q diag(scale) of a metric: Q orthonormal [d, d] (None is the identity), scale [d] positive, float64."""

    scale: Tensor
    basis: Tensor | None = None

    @classmethod
    def of(cls, metric: Tensor, damping: float) -> Root:
        """The root of a symmetric [d, d] float64 metric plus `damping` times the mean of its diagonal."""
        values, basis = torch.linalg.eigh(metric)
        level = metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
        return cls((values.clamp_min(0) + damping * level).sqrt(), basis)

    def apply(self, X: Tensor) -> Tensor:
        """Root^T X for X [d, c]."""
        return self.scale[:, None] * (X if self.basis is None else self.basis.T @ X)

    def solve(self, X: Tensor) -> Tensor:
        """Root^-T X for X [d, c]."""
        X = X / self.scale[:, None]
        return X if self.basis is None else self.basis @ X


@dataclass(frozen=True)
class Decomposition:
    """Full-length factors of one matrix; its first r components are its rank-r model.

    second: B [m, k], first: A [k, n], spectrum: [k] descending, in the metric's norm; centre: A mu [k] where the factors are
    affine. One dtype, one device.
    """

    second: Tensor
    first: Tensor
    spectrum: Tensor
    centre: Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Decomposition:
        """The same factors elsewhere; the spectrum keeps its dtype."""
        centre = None if self.centre is None else self.centre.to(device, dtype)
        return Decomposition(self.second.to(device, dtype), self.first.to(device, dtype), self.spectrum.to(device), centre)

    def dropped(self, mask: Tensor) -> Tensor | None:
        """The mean output [m] of what `mask` [k] drops, for the bias; None where the factors are not affine."""
        return None if self.centre is None else self.second @ ((1 - mask).to(self.centre) * self.centre)


def decompose(W: Tensor, left: Root | None, right: Root | None, mean: Tensor | None = None) -> Decomposition:
    """Decompose W [m, n] in the metric of the roots (None is the identity), in float64; affine with the `mean` [n] of its inputs.

    Raises `RankwiseError` where W is not finite.
    """
    W = W.detach().double()
    if not torch.isfinite(W).all():
        raise RankwiseError("the weight has values that are not finite")
    RW = W if left is None else left.apply(W)
    M = RW if right is None else right.apply(RW.T).T
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    A = U.T @ RW
    return Decomposition(U if left is None else left.solve(U), A, S, None if mean is None else A @ mean)
