"""The layer that runs in a compressed model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = second(first(x)): the weight W [out_features, in_features] written as B [out_features, rank] A [rank, in_features].

    Both factors are plain `nn.Linear`, so whatever handles linear layers (PEFT, torchao, FSDP, torch.compile, exporters)
    handles them; a bias belongs to `second`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """A layer of the factors `second` [out_features, rank] and `first` [rank, in_features], in their dtype and device."""
        (out_features, rank), in_features = second.shape, first.shape[1]
        layer = cls(in_features, out_features, rank, bias is not None, device="meta", dtype=second.dtype)
        layer.first.weight = nn.Parameter(first.contiguous(), requires_grad=False)
        layer.second.weight = nn.Parameter(second.contiguous(), requires_grad=False)
        if bias is not None:
            layer.second.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:
        """The dense product [out_features, in_features], computed at each read: some models look at their layers' weights."""
        weights = (self.second.weight, self.first.weight)  # packed ones multiply inputs only
        second, first = (weight.to_dense() if weight.is_mkldnn else weight for weight in weights)
        return second @ first

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.second(self.first(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
