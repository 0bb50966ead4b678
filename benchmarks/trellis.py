"""The tables of `rankwise.layers.trellis`, and how far they are from what is possible: the squared error of normal weights.

    python benchmarks/trellis.py [--memories 4] [--starts 8]

A table is found by going from the paths to the means of what they stand for and back (Lloyd's algorithm; on a trellis, Stewart,
Gray and Linde 1982), from the quantiles of the normal distribution in `--starts` orders; the best one counts. Beside it: the best
levels for every weight by itself, and the bound 2^(-2 bits) of all coding. Prints the tables in 64ths; writes
benchmarks/results/trellis.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rankwise.decomposition.trellis import nearest_path
from rankwise.layers.trellis import TRELLIS_GROUP, states

RESULTS = Path(__file__).parent / "results" / "trellis.md"
BITS, ROUNDS, ROWS = (2, 3), 25, 2000
PARTS = 64


def drawn(seed: int, rows: int = ROWS) -> Tensor:
    """Normal weights [group, rows]."""
    return torch.randn(TRELLIS_GROUP, rows, generator=torch.Generator().manual_seed(seed))


def states_of(x: Tensor, table: Tensor, bits: int) -> Tensor:
    """The states [group, rows] of the paths nearest to x."""
    memory = len(table).bit_length() - 1 - bits
    return states(nearest_path(x, torch.ones(len(x)), table, bits).T.to(torch.int8), bits, memory).T.long()


def better(table: Tensor, x: Tensor, bits: int) -> Tensor:
    """The table [states] with the mean of what each state stood for."""
    found = states_of(x, table, bits).flatten()
    sums, numbers = (torch.zeros_like(table).scatter_add_(0, found, what.flatten()) for what in (x, torch.ones_like(x)))
    return torch.where(numbers > 0, sums / numbers.clamp_min(1), table)


def error_of(table: Tensor, bits: int) -> float:
    """Mean squared error, relative to the variance, on weights that no table was made from."""
    x = drawn(-1, 4 * ROWS)
    return float((table[states_of(x, table, bits)] - x).square().mean())


def table_of(bits: int, memory: int, start: int) -> Tensor:
    """A table [2^(bits + memory)] for weights of variance 1."""
    size = 2 ** (bits + memory)
    table = torch.special.ndtri((torch.arange(size) + 0.5) / size)[
        torch.randperm(size, generator=torch.Generator().manual_seed(start))
    ]
    for turn in range(ROUNDS):
        table = better(table, drawn(1000 * start + turn), bits)
    return table


def distinct(whole: Tensor, bits: int) -> Tensor:
    """The table with no two codes after the same memory for one value, so that values tell codes."""
    for row in whole.view(-1, 2**bits):
        for code in range(2**bits):
            while row[code] in row[:code]:
                row[code] += 1
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", nargs="+", type=int, default=[4])
    parser.add_argument("--starts", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for bits in BITS:
        alone = torch.special.ndtri((torch.arange(2**bits) + 0.5) / 2**bits)
        for turn in range(200):
            alone = better(alone, drawn(turn), bits)
        cells = [error_of(alone, bits)]
        for memory in args.memories:
            tables = [table_of(bits, memory, start) for start in range(args.starts)]
            best = min(tables, key=lambda table: error_of(table, bits))
            unit = 2 ** (bits - 1) / best.abs().max() * PARTS
            whole = distinct((best * unit).round(), bits)
            cells.append(error_of(whole / unit, bits))
            print(f"{bits} bits, memory of {memory}:", ", ".join(f"{int(v)}" for v in whole))
        rows.append(f"| {bits} | " + " | ".join(f"{cell:.4f}" for cell in (*cells, 4.0**-bits)) + " |")
    heads = ["each by itself", *(f"memory of {memory} bits" for memory in args.memories), "bound"]
    RESULTS.write_text("\n".join(["| bits | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *rows]) + "\n")


if __name__ == "__main__":
    main()
