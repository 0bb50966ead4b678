"""Blocks whose weights are on disk: one block's in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from rankwise.integration.blocks import Blocks
from rankwise.integration.source import Source


@dataclass
class StoredBlocks(Blocks):
    """The blocks of an empty model, and where its weights are."""

    source: Source = field(kw_only=True)

    @contextmanager
    def loaded(self, names: Collection[str]) -> Iterator[None]:
        """These parameters with their values on the device while inside, empty again afterwards."""
        empty = {}
        try:
            for name, values in self.source.values(names):
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                empty[name] = module._parameters[leaf]
                module._parameters[leaf] = nn.Parameter(values.to(self.device), requires_grad=False)
                del values
            yield
        finally:
            for name, parameter in empty.items():
                path, _, leaf = name.rpartition(".")
                self.model.get_submodule(path)._parameters[leaf] = parameter
