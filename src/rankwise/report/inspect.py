"""The ranks of a result folder, read without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from rankwise.integration.checkpoint import load_config
from rankwise.integration.result import read_ranks
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import Shape, unstack_experts


def inspect(folder: Path) -> list[dict[str, Any]]:
    """One row per matrix: name, out_features, in_features, rank (None: dense), break-even rank, parameters before and after.

    Raises `RankwiseError` for a folder that rankwise did not write.
    """
    ranks = read_ranks(folder)
    config = load_config(folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    unstack_experts(model)
    rows = []
    for name, rank in ranks.items():
        shape = Shape(*weight_of(model.get_submodule(name)).shape)
        rows.append(
            {
                "matrix": name,
                "out_features": shape.out_features,
                "in_features": shape.in_features,
                "rank": rank,
                "break_even_rank": shape.dense / shape.per_rank,
                "parameters": shape.parameters(rank),
                "dense_parameters": shape.dense,
            }
        )
    return rows
