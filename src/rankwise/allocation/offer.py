"""What a matrix may be written as where bytes are the budget: dense in few bits, or of low rank in 8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankwise.allocation.multiple_choice import Floats, Ints
from rankwise.layers.matrices import Shape
from rankwise.layers.quantised import BYTE, WIDTHS

RANKS = 48  # of low rank at most, evenly spaced
Way = tuple[int | None, int]  # a rank, None for dense, and bits: of the matrix, or of both factors


@dataclass(frozen=True)
class Offer:
    """The ways of one matrix, the bytes that each is stored in, and the squared error of each in the metric's norm: [ways]."""

    ways: list[Way]
    bytes: Ints
    errors: Floats

    @classmethod
    def of(cls, shape: Shape, spectrum: Tensor, rounding: Mapping[int, float], dtype: torch.dtype, multiple: int) -> Offer:
        """The offer of a matrix with that spectrum; rounding: bits -> squared error of the dense matrix; dtype: of its scales.

        Factors in 8 bits are taken to add the error of a dense matrix in 8.
        """
        most = shape.largest_rank(multiple)
        step = max(multiple, most // RANKS // multiple * multiple)
        ways: list[Way] = [*((None, bits) for bits in WIDTHS), *((rank, BYTE) for rank in range(step, most + 1, step))]
        tail = tail_of(spectrum)
        errors = [rounding[bits] if rank is None else tail[rank] + rounding[bits] for rank, bits in ways]
        return cls(ways, np.array([shape.stored_bytes(*way, dtype) for way in ways]), np.array(errors))

    def of_bits(self) -> Offer:
        """The ways of the dense matrix alone."""
        dense = [rank is None for rank, _ in self.ways]
        return Offer([way for way, kept in zip(self.ways, dense, strict=True) if kept], self.bytes[dense], self.errors[dense])

    def dense_bytes(self, bits: int) -> int:
        """What the dense matrix takes in so many bits."""
        return int(self.bytes[self.ways.index((None, bits))])


def tail_of(spectrum: Tensor) -> Floats:
    """[k + 1]: the squared error of each rank."""
    squares = spectrum.double().cpu().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).numpy()
