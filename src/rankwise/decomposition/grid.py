"""Whole numbers times a scale: what a group of weights can become in few bits.

The sign of a scale gives the largest weight of its group the code -2^(bits-1): of negative codes there is one more than of
positive ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = torch.linspace(1.0, 0.55, 16)  # of a scale, relative to that which clips nothing
TINY = 1e-30  # the scale of a group of zeros


def whole_numbers(scaled: Tensor, most: float) -> Tensor:
    """The whole numbers nearest to weights over their scale, from -most to most - 1."""
    return scaled.round().clamp_(-most, most - 1)


def unclipped_scale(group: Tensor, most: float) -> Tensor:
    """The scale [m] of the columns [columns, m] of a group that gives the largest weight the code -`most`."""
    scale = group.gather(0, group.abs().argmax(0, keepdim=True))[0] / -most
    return torch.where(scale.abs() < TINY, TINY, scale)


def best_scale(group: Tensor, most: float, importance: Tensor) -> Tensor:
    """The scale [m] with the least error of the columns [columns, m] of a group, of some that clip more or less; the error of
    a column counts by its importance [columns]."""
    sizes = unclipped_scale(group, most) * SIZES.to(group)[:, None]
    errors = []
    for size in sizes:
        scaled = group / size
        errors.append(importance @ (whole_numbers(scaled, most) - scaled).square_() * size.square())
    return sizes.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded to the dtype it is stored in, as float32; never zero."""
    stored = scale.to(dtype).float()
    return torch.where(stored == 0, torch.finfo(dtype).tiny, stored)
