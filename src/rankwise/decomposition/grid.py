"""Whole numbers times a scale: what a group of weights can become in few bits.

The sign of a scale gives the largest weight of its group the code -2^(bits-1): of negative codes there is one more than of
positive ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.layers.quantised import COARSE, in_units, of_units

ROOM = 4.0  # scales grow where errors are made up for
SIZES = torch.linspace(1.06, 0.55, 16)  # of a scale, relative to that which clips nothing
TINY = 1e-30  # the scale of a group of zeros


def whole_numbers(scaled: Tensor, most: float) -> Tensor:
    """The whole numbers nearest to weights over their scale, from -most to most - 1."""
    return scaled.round().clamp_(-most, most - 1)


def unclipped_scale(group: Tensor, most: float) -> Tensor:
    """The scale [m] of the columns [columns, m] of a group that gives the largest weight the code -`most`."""
    scale = group.gather(0, group.abs().argmax(0, keepdim=True))[0] / -most
    return torch.where(scale.abs() < TINY, TINY, scale)


def best_scale(group: Tensor, most: float, importance: Tensor, unit: Tensor) -> Tensor:
    """The scale [m], as stored in this unit, with the least error of the columns [columns, m] of a group, of some that clip more
    or less; the error of a column counts by its importance [columns]."""
    sizes = as_stored(unclipped_scale(group, most) * SIZES.to(group)[:, None], unit)
    errors = []
    for size in sizes:
        scaled = group / size
        errors.append(importance @ (whole_numbers(scaled, most) - scaled).square_() * size.square())
    return sizes.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def as_stored(scale: Tensor, unit: Tensor) -> Tensor:
    """The scale rounded as it is stored in this unit, float32; never zero."""
    return of_units(in_units(scale, unit), unit.float())


def unit_of(W: Tensor, most: float) -> Tensor:
    """The unit [1] of the scales of W [m, n], in its dtype: a power of two with room for scales that are `ROOM` times the largest
    one that clips nothing."""
    largest, limits = W.abs().max().float() / most * ROOM / torch.finfo(COARSE).max, torch.finfo(W.dtype)
    return torch.exp2(largest.clamp(limits.tiny, limits.max).log2().ceil()).to(W.dtype)[None]
