"""Layers whose weight is held in few bits: a whole number for every weight, and a scale for a group of them in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a whole number
GROUP = 64  # weights of a row that share a scale; with 8 bits all of a row do
BYTE = 8
# [256] int64, whose byte j, the least one first, is bit j of the place
SPREAD = (torch.arange(256)[:, None] >> torch.arange(BYTE) & 1).to(torch.uint8).view(torch.int64)[:, 0]


class QuantisedLinear(nn.Module):
    """y = W x + b, where W [m, n] is a whole number of `bits` bits, from -2^(bits-1) on, times the scale of its group.

    scales [m, groups] are in the model's dtype. codes: with 8 bits int8 [m, n]; with fewer uint8 [m, bits, n / 8, rounded up],
    where bit j of byte i in plane p is bit p of the code of column 8 i + j, counted from the least one.
    """

    codes: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        packed = (out_features, in_features) if bits == BYTE else (out_features, bits, -(-in_features // BYTE))
        kind = torch.int8 if bits == BYTE else torch.uint8
        self.register_buffer("codes", torch.zeros(packed, dtype=kind, device=device))
        groups = -(-in_features // group_of(bits, in_features))
        self.register_buffer("scales", torch.zeros(out_features, groups, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    def like(cls, linear: nn.Linear, bits: int) -> Self:
        """The layer of a linear layer's sizes, dtype and device, without values."""
        weight, bias = linear.weight, linear.bias is not None
        return cls(linear.in_features, linear.out_features, bits, bias, weight.device, weight.dtype)

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, bits: int, bias: Tensor | None = None) -> Self:
        """The layer of whole numbers [m, n] and scales [m, groups]."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, bits, bias is not None, "meta", scales.dtype)
        layer.codes, layer.scales = pack(codes, bits), scales.contiguous()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def whole_numbers(self) -> Tensor:
        """[m, n] int8."""
        return unpack(self.codes, self.bits, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [m, n], computed at each read."""
        return dequantised(self.whole_numbers, self.scales, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantisedEmbedding(nn.Module):
    """Row i of W [rows, n], where W is a whole number of 8 bits times the scale of its row. The tensors are those of a
    `QuantisedLinear` of the same weight, so that an output head can share them."""

    codes: Tensor
    scales: Tensor

    def __init__(self, rows: int, n: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = rows, n, BYTE
        self.register_buffer("codes", torch.zeros(rows, n, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(rows, 1, device=device, dtype=dtype))

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> Self:
        """The layer of whole numbers [rows, n] and scales [rows, 1]."""
        layer = cls(codes.shape[0], codes.shape[1], "meta", scales.dtype)
        layer.codes, layer.scales = codes, scales
        return layer

    @property
    def weight(self) -> Tensor:
        """The dense weight [rows, n], computed at each read."""
        return dequantised(self.codes, self.scales, self.bits)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] whole numbers -> [..., n]."""
        return self.codes[ids] * self.scales[ids]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def group_of(bits: int, in_features: int) -> int:
    """How many weights share a scale: with 8 bits a row, which is as good, and what kernels take."""
    return in_features if bits == BYTE else GROUP


def in_bits(layer: nn.Module, write: Callable[[nn.Linear], QuantisedLinear]) -> None:
    """Write each of the linear layers of a layer as `write` does, in place."""
    for name, child in list(layer.named_children()):
        assert isinstance(child, nn.Linear)
        setattr(layer, name, write(child))


def dequantised(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The weight [m, n] of whole numbers [m, n], in the dtype of their scales [m, groups]."""
    n, group = codes.shape[1], group_of(bits, codes.shape[1])
    whole = F.pad(codes, (0, -n % group)).unflatten(1, (-1, group))
    return (whole * scales[..., None]).flatten(1)[:, :n]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [m, n] int8 as they are stored."""
    if bits == BYTE:
        return codes.contiguous()
    unsigned = F.pad((codes + 2 ** (bits - 1)).to(torch.uint8), (0, -codes.shape[1] % BYTE)).unflatten(1, (-1, BYTE))
    places = torch.arange(BYTE, dtype=torch.uint8, device=codes.device)
    return torch.stack([((unsigned >> plane & 1) << places).sum(2, dtype=torch.uint8) for plane in range(bits)], 1)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo `pack`: [m, n] int8. The eight bits of a byte are looked up as eight bytes, which one number of 64 bits holds."""
    if bits == BYTE:
        return packed
    spread = SPREAD.to(packed.device)
    eights = spread[packed[:, 0].int()]
    for plane in range(1, bits):
        eights |= spread[packed[:, plane].int()] << plane
    return eights.view(torch.int8)[:, :in_features] - 2 ** (bits - 1)
