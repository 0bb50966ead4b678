"""Numbers of 2 and 3 bits on a trellis: what a code stands for depends on the codes before it in its group, so that few bits
reach many values (Marcellin and Fischer 1990; as bits shifted through a register, Tseng et al. 2024, QTIP, arXiv 2406.11235).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TRELLIS_GROUP = 64  # weights of a row that share a scale; the first ones of a group come after its last ones, a ring
MEMORY = 4  # bits of earlier codes that are looked at


def _of_64ths(numbers: str) -> Tensor:
    return torch.tensor([int(number) for number in numbers.split()]) / 64


# Bits -> what each state, the code after the memory, stands for: what has the least error for normal weights, in units in which
# the largest is 2^(bits - 1). `benchmarks/trellis.py` makes them.
TABLES = {
    2: _of_64ths(
        "16 90 -29 61 57 -24 13 128 -39 -85 31 11 -86 8 -32 41 -12 -29 -80 25 42 105 -11 -36 -9 34 -62 -58 58 "
        "-51 -110 -2 62 4 8 -59 -44 -84 19 35 -125 -12 -15 -10 -40 56 21 92 -57 34 82 -10 2 34 -37 78 19 -39 "
        "-7 52 11 -21 57 -65"
    ),
    3: _of_64ths(
        "182 85 56 -62 21 150 113 -5 -44 21 63 37 -92 -10 130 84 127 -72 15 -107 -18 48 -26 80 -106 55 256 9 "
        "98 147 -174 -43 -62 16 -26 53 103 74 -172 -116 -13 106 -87 -45 64 -72 -118 31 81 -20 39 190 -53 -96 "
        "8 130 -251 -46 -3 109 -58 41 60 -24 35 -49 93 -4 -16 26 -125 -87 47 12 94 -16 -127 -38 -55 -84 72 "
        "-205 190 -154 51 10 -83 -31 -77 -29 30 -56 158 -151 87 3 -6 136 -86 -35 -129 -5 51 -55 4 -16 -175 74 "
        "40 -47 16 -129 223 66 -140 12 -84 109 -41 36 164 -73 127 -134 -15 23 -104 -207"
    ),
}


def table_of(bits: int, like: Tensor) -> Tensor:
    """What each state [states] stands for, float32, where another tensor is."""
    return TABLES[bits].to(like.device)


def states(codes: Tensor, bits: int, memory: int = MEMORY) -> Tensor:
    """The states [..., group] int16 of the codes [..., group] of a ring, whole numbers from -2^(bits-1) on."""
    unsigned = codes.short() + 2 ** (bits - 1)
    found = unsigned.clone()
    for back in range(1, -(-memory // bits) + 1):
        found |= unsigned.roll(back, -1) << bits * back
    return found & 2 ** (bits + memory) - 1


def values(codes: Tensor, bits: int) -> Tensor:
    """What the codes [m, n] int8 of rows in groups of `TRELLIS_GROUP` stand for, float32 [m, n]. A last group that is smaller is
    no ring and comes after zeros."""
    whole = codes.shape[1] // TRELLIS_GROUP * TRELLIS_GROUP
    rings = states(codes[:, :whole].unflatten(1, (-1, TRELLIS_GROUP)), bits).flatten(1)
    rest = states(F.pad(codes[:, whole:], (MEMORY, 0), value=-(2 ** (bits - 1))), bits)[:, MEMORY:]
    return table_of(bits, codes)[torch.cat([rings, rest], 1).int()]
