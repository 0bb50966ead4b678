"""The tables of a model's vocabulary, one row for each token: its embedding, and its output head where that is no matrix that is
compressed anyway. In few bits they are written in 8, a scale for each row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from rankwise.layers.linear import is_linear


def tables_of(model: Any, matrices: Collection[str]) -> dict[str, nn.Module]:
    """Path -> module of every table that can be written in few bits, with all that share its weight; none that does more than
    look rows up, or multiply by them."""
    ends = [
        get() for name in ("get_input_embeddings", "get_output_embeddings") if (get := getattr(model, name, None)) is not None
    ]
    found: dict[str, nn.Module] = {}
    for weight in {id(end.weight): end.weight for end in ends if isinstance(getattr(end, "weight", None), Tensor)}.values():
        holders = {name: m for name, m in model.named_modules(remove_duplicate=False) if getattr(m, "weight", None) is weight}
        if all(type(m) is nn.Embedding or is_linear(m) for m in holders.values()) and not holders.keys() & set(matrices):
            found |= holders
    return found


def table_bytes(tables: dict[str, nn.Module]) -> tuple[int, int]:
    """Bytes of the tables as they are, and in 8 bits; a weight that several share once."""
    weights: list[Any] = list({id(module.weight): module.weight for module in tables.values()}.values())
    return sum(w.nbytes for w in weights), sum(w.numel() + len(w) * w.element_size() for w in weights)
