"""Whole numbers times a scale: what a group of weights can become in 4 bits and more.

The sign of a scale gives the largest weight of its group the code -2^(bits-1): of negative codes there is one more than of
positive ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.layers.quantised import COARSE, GROUP, in_units, of_units

ROOM = 4.0  # scales grow where errors are made up for
SIZES = torch.linspace(1.06, 0.55, 16)  # of a scale, relative to that which clips nothing
TINY = 1e-30  # the scale of a group of zeros


@dataclass(frozen=True)
class Grid:
    """What a group of columns becomes: whole numbers from -2^(bits-1) on, and for every row a scale as stored in a unit."""

    bits: int
    unit: Tensor
    group = GROUP
    in_order = False

    @property
    def most(self) -> float:
        """Minus the least whole number."""
        return 2.0 ** (self.bits - 1)

    def values(self, numbers: Tensor) -> Tensor:
        """What whole numbers stand for."""
        return numbers

    def first(self, group: Tensor, importance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers [columns, m] and scales [m] of a group [columns, m], whose later columns make up for the errors of
        earlier ones by `within` [columns, columns]; in the choice of a scale those of a column count by its importance."""
        scale = best_scale(group, self.most, importance, self.unit)
        rest, numbers = group / scale, torch.empty_like(group)
        for j, column in enumerate(rest):
            numbers[j] = whole_numbers(column, self.most)
            rest[j + 1 :].addcmul_(within[j, j + 1 :, None], column - numbers[j], value=-1)
        return numbers, scale

    def again(self, target: Tensor, numbers: Tensor, scale: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Each column beside all others, and then the scales, for a target [columns, m] in the metric H [columns, columns]."""
        relative, numbers = H / H.diagonal()[:, None], numbers.clone()
        step = relative @ (target / scale - numbers)
        for j, column in enumerate(numbers):
            change = column - whole_numbers(column + step[j], self.most)
            step.addcmul_(relative[:, j, None], change)
            column -= change
        return numbers, refitted(scale, numbers, target, H, self.unit)


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


def refitted(scale: Tensor, values: Tensor, target: Tensor, H: Tensor, unit: Tensor) -> Tensor:
    """The scales [m], as stored in this unit, that are best for values [columns, m] in the metric H [columns, columns]."""
    seen = H @ values
    size = (seen * values).sum(0)
    return as_stored(torch.where(size > 0, (seen * target).sum(0) / size, scale), unit)


def as_stored(scale: Tensor, unit: Tensor) -> Tensor:
    """The scale rounded as it is stored in this unit, float32; never zero."""
    return of_units(in_units(scale, unit), unit.float())


def unit_of(W: Tensor, most: float) -> Tensor:
    """The unit [1] of the scales of W [m, n], in its dtype: a power of two with room for scales that are `ROOM` times the largest
    one that clips nothing."""
    largest, limits = W.abs().max().float() / most * ROOM / torch.finfo(COARSE).max, torch.finfo(W.dtype)
    return torch.exp2(largest.clamp(limits.tiny, limits.max).log2().ceil()).to(W.dtype)[None]
