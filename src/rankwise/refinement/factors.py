"""Factors as they are trained: a balanced pair in float32, whatever the layer is written as and computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.layers.lowrank import LowRankLinear


class TrainedFactors(nn.Module):
    """y = B A x + bias, for B [m, r] and A [r, n] float32 that ask for gradients, computed in the input's dtype.

    B = U sqrt(S) and A = sqrt(S) V^T of the product's singular value decomposition, so that both have the same scale in every
    direction; pivots and coefficients have not, and would be a poor basis to descend in.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        second, first = (factor.detach().float() for factor in layer.factors)
        (left, upper), (right, lower) = torch.linalg.qr(second), torch.linalg.qr(first.T)
        U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        self.second = nn.Parameter(left @ U * S.sqrt())
        self.first = nn.Parameter(S.sqrt()[:, None] * Vh @ right.T)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The dense product [m, n], computed at each read: some models look at their layers' weights."""
        return self.second @ self.first

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(F.linear(x, self.first.to(x.dtype)), self.second.to(x.dtype), bias)

    def written_as(self, layer: LowRankLinear) -> LowRankLinear:
        """A layer of these factors, of the class, rank and dtype of `layer`."""
        dtype = layer.factors[0].dtype
        bias = None if self.bias is None else self.bias.detach()
        return type(layer).from_factors(self.second.detach(), self.first.detach(), bias).to(dtype)
