"""What is trained of a layer, in float32, whatever it is written as and computes in: a balanced pair of factors of one of low
rank, the weight of a narrower one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.layers.linear import bias_of, dense_linear, holds_matrix, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.masks.student import Layers, Student


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

    def written_as(self, layer: nn.Module) -> LowRankLinear:
        """A layer of these factors, of the class, rank and dtype of `layer`."""
        assert isinstance(layer, LowRankLinear)
        dtype = layer.factors[0].dtype
        bias = None if self.bias is None else self.bias.detach()
        return type(layer).from_factors(self.second.detach(), self.first.detach(), bias).to(dtype)


class TrainedWeight(nn.Module):
    """y = W x + bias, for W [m, n] float32 that asks for gradients, computed in the input's dtype."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        bias = bias_of(layer)
        self.weight = nn.Parameter(weight_of(layer).detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def written_as(self, layer: nn.Module) -> nn.Module:
        """A layer of this weight, of the class and dtype of `layer`."""
        bias = None if self.bias is None else self.bias.detach()
        return dense_linear(self.weight.detach(), bias, isinstance(layer, Conv1D)).to(weight_of(layer).dtype)


Trained = TrainedFactors | TrainedWeight


def in_training(student: Student, layers: Layers) -> dict[str, Trained]:
    """What is trained of those of the layers that are of low rank, or smaller than the original's."""

    def made(name: str, layer: nn.Module) -> Trained | None:
        if isinstance(layer, LowRankLinear):
            return TrainedFactors(layer)
        original = student.originals[name] if name in student.originals else student.model.get_submodule(name)
        smaller = holds_matrix(layer) and weight_of(layer).shape != weight_of(original).shape
        return TrainedWeight(layer) if smaller else None

    return {name: found for name, layer in layers.items() if (found := made(name, layer)) is not None}


def scales_of(trained: Mapping[str, Trained]) -> dict[Tensor, float]:
    """How large a step each parameter may take: in proportion to its numbers, and the smaller the more inputs add up, as all of
    them move at once (Yang et al. 2022, arXiv 2203.03466)."""
    parameters = [parameter for factors in trained.values() for parameter in factors.parameters()]
    return {p: p.detach().square().mean().sqrt().item() / math.sqrt(p.shape[-1]) for p in parameters}


def written(trained: Mapping[str, Trained], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers with what was trained in place of theirs, in their own class, rank and dtype."""
    return {name: trained[name].written_as(layer) if name in trained else layer for name, layer in layers.items()}
