"""One solver for every metric: one eigen-decomposition, on the smaller side of the matrix.

Legend: W [m, n] the weight, R R^T the metric on outputs [m, m], L L^T the metric on inputs [n, n], k = min(m, n).
The best rank-r approximation in the norm ||R^T (W - W') L|| is (Eckart-Young, with M = R^T W L = U S V^T)

    W'_r = R^-T U_r U_r^T R^T W        B = R^-T U   [m, k]        A = U^T R^T W   [k, n]

so that B[:, :r] A[:r] is the rank-r model for every r, and the error of dropping component i is exactly S_i^2. V is nowhere in
it: U and S^2 are the eigenvectors and eigenvalues of M M^T = R^T W (L L^T) W^T R. So the metric on inputs is only multiplied
by, never factorised, and may be singular. A tall R^T W = Q T [n, n] is reduced first: U = Q times the eigenvectors of
T (L L^T) T^T.

Precision: M M^T holds the squares of S and is float64 throughout, where S below 1e-8 S_1 is rounding: far less than what float32
activations leave uncertain. The factors are products with orthonormal matrices, which are no worse than the weight's own
rounding in float32, and are float32 unless the weight is float64 or R is there to be undone.

Affine factors (AFM, Yu and Wu 2023) keep the mean output whatever is dropped: with mu = E[x] and c = A mu, a dropped component
leaves its mean B_i c_i in the bias. L L^T is then the covariance of x, not its second moment.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.layers.precision import exact_device, is_finite

LEAST = 1e-290  # a smaller mean is no metric, but what is left of one below the range of float64


@dataclass(frozen=True)
class Root:
    """A square root F of the metric F F^T = full / count + diag(scale^2) [d, d]: `full` positive semidefinite (None is zero),
    scale [d]. All float64; `full` is read, never copied to be kept."""

    scale: Tensor
    full: Tensor | None = None
    count: int = 1

    @classmethod
    def of(cls, total: Tensor, damping: float, count: int = 1, shrinkage: float = 0.0) -> Root:
        """The root of a positive semidefinite [d, d] float64 metric, `total` / `count`, plus `damping` times the mean of its
        diagonal, plus `shrinkage` times the diagonal itself; of a zero metric the root of `damping` times the identity."""
        diagonal = total.diagonal().clamp_min(0) / count
        level = diagonal.mean()
        level = torch.where(level > LEAST, level, 1.0)
        return cls((damping * level + shrinkage * diagonal).sqrt(), total, count)

    @property
    def metric(self) -> Tensor:
        """F F^T [d, d] float64, a tensor of its own."""
        if self.full is None:
            return torch.diag(self.scale.square())
        damped = self.full / self.count
        damped.diagonal().add_(self.scale.square())
        return damped

    def gram(self, X: Tensor) -> Tensor:
        """(X F) (X F)^T for X [c, d]; needs no root."""
        if self.full is None:
            X = X * self.scale
            return X @ X.T
        return (X @ self.full).div_(self.count).addcmul_(X, self.scale.square()) @ X.T

    def apply(self, X: Tensor) -> Tensor:
        """F^T X for X [d, c], in its dtype."""
        return self.scale[:, None].to(X) * X if self.full is None else self._factor.T.to(X) @ X

    def solve(self, X: Tensor) -> Tensor:
        """F^-T X for X [d, c]."""
        return X / self.scale[:, None] if self.full is None else torch.linalg.solve_triangular(self._factor.T, X, upper=True)

    @functools.cached_property
    def _factor(self) -> Tensor:
        """F, lower triangular. Where rounding leaves the metric indefinite, no eigenvalue is taken below the least of scale^2."""
        damped = self.metric
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            values, basis = torch.linalg.eigh(damped)
            root = values.clamp_min(self.scale.square().min()).sqrt()
            factor = torch.linalg.qr(root[:, None] * basis.T, mode="r").R.T
        return factor


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
        spectrum = self.spectrum if device is None else self.spectrum.to(exact_device(torch.device(device)))
        return Decomposition(self.second.to(device, dtype), self.first.to(device, dtype), spectrum, centre)

    def dropped(self, mask: Tensor) -> Tensor | None:
        """The mean output [m] of what `mask` [k] drops, for the bias; None where the factors are not affine."""
        return None if self.centre is None else self.second @ ((1 - mask).to(self.centre) * self.centre)


def decompose(W: Tensor, left: Root | None, right: Root | None, mean: Tensor | None = None) -> Decomposition:
    """Decompose W [m, n] in the metric of the roots (None is the identity); affine with the `mean` [n] of its inputs.

    The factors are float64 where W is or `left` is there, else float32; the spectrum is float64. Raises `RankwiseError`
    where W is not finite.
    """
    dtype = torch.float64 if left is not None else torch.promote_types(W.dtype, torch.float32)
    W = W.detach().to(exact_device(W.device), dtype)
    if not is_finite(W):
        raise RankwiseError("the weight has values that are not finite")
    T = W if left is None else left.apply(W)
    Q = None
    if len(T) > T.shape[1]:
        Q, T = torch.linalg.qr(T)
    exact = T.double()
    squares, U = torch.linalg.eigh(exact @ exact.T if right is None else right.gram(exact))
    U = U.flip(1).to(T.dtype)
    A = U.T @ T
    B = U if Q is None else Q @ U
    B = B if left is None else left.solve(B)
    return Decomposition(B, A, squares.flip(0).clamp_min(0).sqrt(), None if mean is None else A @ mean.to(A))
