"""The list of blocks that a model's matrices are in."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn


def block_lists(model: nn.Module, matrices: Collection[str]) -> dict[str, nn.ModuleList]:
    """Path -> list, of every list of modules that holds one of the matrices (the outermost, where lists hold lists)."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = {match[1] for matrix in matrices if (match := re.match(r"(.*?)\.\d+\.", matrix)) and match[1] in lists}
    return {path: lists[path] for path in sorted(found)}


def block_of(matrix: str, path: str) -> int | None:
    """The number of the block in the list at `path` that a matrix is in; None where it is in none."""
    match = re.match(re.escape(path) + r"\.(\d+)\.", matrix)
    return int(match[1]) if match else None
