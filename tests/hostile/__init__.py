"""Malformed inputs: each a name, a command line, and what is done to a folder in which it would succeed.

The folder holds `llama`, a tiny model with its tokenizer, `small`, the same compressed, and `story.txt`.
"""

from __future__ import annotations

from collections import Counter

from hostile import compressed, files, lines, tensors
from hostile.case import COMPRESS, DENSIFY, EVALUATE, INSPECT, Case

__all__ = ["COMPRESS", "DENSIFY", "EVALUATE", "INSPECT", "Case", "cases"]
MAKERS = (
    *(files.json_files, files.configs, files.tokenizers),
    *(tensors.safetensors, tensors.shards, tensors.pickles),
    *(compressed.quantization, compressed.compressed_weights),
    *(lines.recipes, lines.texts, lines.lines),
)


def cases() -> list[Case]:
    """All of them."""
    found = [case for make in MAKERS for case in make()]
    twice = [name for name, times in Counter(case.name for case in found).items() if times > 1]
    assert not twice, twice
    return found
