"""Layers whose weight is held in few bits: a code for every weight, and a scale for a group of them in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.layers.trellis import TABLES, TRELLIS_GROUP, values

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a whole number
BYTE = 8
GROUP = 32  # weights of a row that share a scale; on a trellis more, and with 8 bits all of a row do
EARLIER_GROUP = 64
Coding = Literal["floats", "grid", "trellis"]
CODING: Coding = "trellis"  # that is written; "floats" is of folders before format 5, "grid" of format 5
COARSE = torch.float8_e4m3fn  # of a scale over its matrix's unit
# [256] int64, whose byte j, the least one first, is bit j of the place
SPREAD = (torch.arange(256)[:, None] >> torch.arange(BYTE) & 1).to(torch.uint8).view(torch.int64)[:, 0]


class QuantisedLinear(nn.Module):
    """y = W x + b, where W [m, n] is what a code, a whole number of `bits` bits from -2^(bits-1) on, stands for, times the step
    of its group. It stands for itself, and in 2 and 3 bits, on a trellis, for a value in a table.

    codes: with 8 bits int8 [m, n]; with fewer uint8 [m, bits, n / 8, rounded up], where bit j of byte i in plane p is bit p of
    the code of column 8 i + j, counted from the least one.
    scales: with 8 bits the steps [m, 1] in the model's dtype; with fewer uint8 [m, groups], the bytes of numbers in `COARSE`,
    times `unit` [1], a power of two in the model's dtype. In the coding "floats", of groups of `EARLIER_GROUP`, they are the
    steps too; in this one and in "grid" there is no trellis.
    """

    codes: Tensor
    scales: Tensor
    unit: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        coding: Coding = CODING,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.coding = in_features, out_features, bits, coding
        self.group = group_of(bits, coding) or in_features
        packed = (out_features, in_features) if bits == BYTE else (out_features, bits, -(-in_features // BYTE))
        kind = torch.int8 if bits == BYTE else torch.uint8
        self.register_buffer("codes", torch.zeros(packed, dtype=kind, device=device))
        coarse, groups = bits < BYTE and coding != "floats", -(-in_features // self.group)
        scales = torch.zeros(out_features, groups, device=device, dtype=torch.uint8 if coarse else dtype)
        self.register_buffer("scales", scales)
        self.register_buffer("unit", torch.ones(1, device=device, dtype=dtype) if coarse else None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    def like(cls, linear: nn.Linear, bits: int, coding: Coding = CODING) -> Self:
        """The layer of a linear layer's sizes, dtype and device, without values."""
        weight, bias = linear.weight, linear.bias is not None
        return cls(linear.in_features, linear.out_features, bits, bias, weight.device, weight.dtype, coding)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        steps: Tensor,
        unit: Tensor | None,
        bits: int,
        bias: Tensor | None = None,
        coding: Coding = CODING,
    ) -> Self:
        """The layer of codes [m, n] and steps [m, groups], stored to the nearest in this unit; without, as "floats"."""
        out_features, in_features = codes.shape
        coding = coding if unit is not None else "floats"
        layer = cls(in_features, out_features, bits, bias is not None, "meta", steps.dtype, coding)
        layer.codes, layer.unit = pack(codes, bits), unit
        layer.scales = steps.contiguous() if unit is None else in_units(steps, unit)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's numbers."""
        return (self.scales if self.unit is None else self.unit).dtype

    @property
    def whole_numbers(self) -> Tensor:
        """[m, n] int8."""
        return unpack(self.codes, self.bits, self.in_features)

    @property
    def steps(self) -> Tensor:
        """The scales [m, groups] in the model's dtype."""
        return self.scales if self.unit is None else of_units(self.scales, self.unit)

    @property
    def weight(self) -> Tensor:
        """The dense weight [m, n], computed at each read."""
        return dequantised(self.whole_numbers, self.steps, self.bits, self.coding)

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
        return self.codes * self.scales

    def forward(self, ids: Tensor) -> Tensor:
        """[...] whole numbers -> [..., n]."""
        return self.codes[ids] * self.scales[ids]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def in_units(steps: Tensor, unit: Tensor) -> Tensor:
    """Steps as they are stored, uint8: the nearest ones in `COARSE` times the unit, none of them zero."""
    limits = torch.finfo(COARSE)
    stored = (steps.float() / unit.float()).clamp(limits.min, limits.max).to(COARSE).view(torch.uint8)
    return torch.where(stored & 127 == 0, stored | 1, stored)  # the least number instead of a zero of its sign


def of_units(scales: Tensor, unit: Tensor) -> Tensor:
    """Undo `in_units`, in the unit's dtype, exactly."""
    return scales.view(COARSE).to(unit.dtype) * unit


def in_bits(layer: nn.Module, write: Callable[[nn.Linear], QuantisedLinear]) -> None:
    """Write each of the linear layers of a layer as `write` does, in place."""
    for name, child in list(layer.named_children()):
        assert isinstance(child, nn.Linear)
        setattr(layer, name, write(child))


def group_of(bits: int, coding: Coding = CODING) -> int | None:
    """How many weights of a row share a scale; None is all."""
    if bits == BYTE:
        return None
    return EARLIER_GROUP if coding == "floats" else TRELLIS_GROUP if on_trellis(bits, coding) else GROUP


def on_trellis(bits: int, coding: Coding = CODING) -> bool:
    """Whether codes stand for values in a table, and not for themselves."""
    return coding == "trellis" and bits in TABLES


def dequantised(codes: Tensor, steps: Tensor, bits: int, coding: Coding = CODING) -> Tensor:
    """The weight [m, n] of codes [m, n] int8, in the dtype of their steps [m, groups]."""
    stand_for = values(codes, bits).to(steps.dtype) if on_trellis(bits, coding) else codes
    return times_steps(stand_for, steps, group_of(bits, coding) or codes.shape[1])


def times_steps(values: Tensor, steps: Tensor, group: int) -> Tensor:
    """Values [m, n] times the steps [m, groups] of their groups."""
    n = values.shape[1]
    return (F.pad(values, (0, -n % group)).unflatten(1, (-1, group)) * steps[..., None]).flatten(1)[:, :n]


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
