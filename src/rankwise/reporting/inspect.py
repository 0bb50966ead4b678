"""The ranks of a result folder, read without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.integration.checkpoint import load_config, quantization_of
from rankwise.integration.result import narrowed, read_ranks, read_shapes


def inspect(folder: str | Path) -> list[dict[str, Any]]:
    """Return one row per matrix: name, out_features, in_features, rank (None: dense), bits of a number
    (None: as the model's floats), break-even rank, parameters before and after.

    Raises `RankwiseError` for a folder that rankwise did not write.
    """
    folder = Path(folder)
    ranks = read_ranks(folder)
    config, before = load_config(folder), read_shapes(folder, ranks)
    bits = quantization_of(config).get("bits", {})
    rows = []
    for name, shape in narrowed(before, config).items():
        rank = ranks[name]
        rows.append(
            {
                "matrix": name,
                "out_features": shape.out_features,
                "in_features": shape.in_features,
                "rank": rank,
                "bits": bits.get(name),
                "break_even_rank": shape.break_even,
                "parameters": shape.parameters(rank),
                "dense_parameters": before[name].dense,
            }
        )
    return rows
