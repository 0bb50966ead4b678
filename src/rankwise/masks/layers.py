"""Masks over the singular components of matrices, and the layers that apply one.

Legend: one mask per matrix, [k] float32, one weight per component; 0 drops it. A matrix without a mask is dense; so is one
whose mask drops nothing: its components are weighted, and it is stored as one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.decomposition.solver import Decomposition
from rankwise.layers.linear import bias_of, dense_linear, weight_of
from rankwise.layers.lowrank import LowRankLinear, PairLinear, layer_class

Masks = dict[str, Tensor | None]


class MaskedLinear(nn.Module):
    """y = B (mask * A x) + bias, for B [m, k], A [k, n] and mask [k]; affine factors keep their centre c [k] instead of 0:
    y = B (mask * (A x - c) + c) + bias."""

    def __init__(self, second: Tensor, first: Tensor, bias: Tensor | None, mask: Tensor, centre: Tensor | None = None) -> None:
        super().__init__()
        self.second, self.first, self.bias, self.mask, self.centre = second, first, bias, mask, centre
        self.on_gradient: Callable[[Tensor], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The dense product [m, n], computed at each read: some models look at their layers' weights."""
        return (self.second * self.mask.to(self.second.dtype)) @ self.first

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        mask = self.mask.to(x.dtype)
        if self.on_gradient is not None and torch.is_grad_enabled():  # one mask per sequence, so that each shows its own gradient
            mask = mask.expand(len(x) if x.ndim == 3 else 1, *[1] * (x.ndim - 2), -1)
            mask.register_hook(self.on_gradient)
        z = F.linear(x, self.first)
        z = z * mask if self.centre is None else torch.lerp(self.centre, z, mask)
        return F.linear(z, self.second, self.bias)


class WeightedLinear(nn.Module):
    """y = W x + B ((mask - 1) * A x) + bias: a dense matrix [m, n] with its components weighted, W itself where mask [k] is 1."""

    def __init__(self, linear: nn.Module, second: Tensor, first: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.linear, self.second, self.first, self.mask = linear, second, first, mask

    @property
    def weight(self) -> Tensor:
        """[m, n], computed at each read."""
        return weight_of(self.linear) + (self.second * (self.mask - 1).to(self.second)) @ self.first

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        y: Tensor = self.linear(x)
        return y + F.linear(F.linear(x, self.first) * (self.mask - 1).to(x), self.second)


def is_whole(mask: Tensor | None) -> bool:
    """Whether the matrix of this mask stays dense."""
    return mask is None or bool(mask.all())


def hard_mask(rank: int, length: int) -> Tensor:
    """The mask [length] that keeps the first `rank` components."""
    return (torch.arange(length) < rank).float()


def add(bias: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Their sum; None counts as zero."""
    return more if bias is None else bias if more is None else bias + more


def folded(linear: nn.Module, decomposition: Decomposition, mask: Tensor, form: str = PairLinear.form) -> nn.Module:
    """The layer to run in place of `linear`: of the kept components, the mask's values folded into its first factor; or
    dense, with the values folded into its weight. A pair of factors takes nothing to make; any other form is the same product."""
    if not is_whole(mask):
        cls = layer_class(form, *weight_of(linear).shape)
        return factorised(decomposition, mask, bias_of(linear), cls).to(weight_of(linear).dtype)
    return dense_linear(weighted(weight_of(linear), decomposition, mask), bias_of(linear), isinstance(linear, Conv1D))


def weighted(weight: Tensor, decomposition: Decomposition, mask: Tensor) -> Tensor:
    """The dense weight [m, n] with its components weighted."""
    second, first = decomposition.second.float(), decomposition.first.float()
    change = (second * (mask - 1).to(second)) @ first
    return (weight.float() + change.to(weight.device)).to(weight.dtype)


def factorised(decomposition: Decomposition, mask: Tensor, bias: Tensor | None, cls: type[LowRankLinear]) -> LowRankLinear:
    """The layer of the kept components, of this class."""
    kept = mask.nonzero().squeeze(-1).to(decomposition.first.device)
    values = mask.to(decomposition.first)[kept]
    return cls.from_factors(
        decomposition.second[:, kept], values[:, None] * decomposition.first[kept], add(bias, decomposition.dropped(mask))
    )
