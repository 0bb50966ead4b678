"""Blocks whose weights are on disk: one block's in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from rankwise.integration.blocks import Blocks
from rankwise.integration.source import Source
from rankwise.layers.linear import weight_of


@dataclass(frozen=True)
class Narrower:
    """A linear layer that stands in the place of the original's, both empty, and the file of its values."""

    layer: nn.Module
    original: nn.Module
    file: Path


@dataclass
class StoredBlocks(Blocks):
    """The blocks of an empty model, and where its weights are. narrower: by path, the layers that are not the original's."""

    source: Source = field(kw_only=True)
    narrower: dict[str, Narrower] = field(default_factory=dict)

    @contextmanager
    def loaded(self, names: Collection[str]) -> Iterator[None]:
        """These parameters with their values on the device while inside, empty again afterwards; where a layer is narrower, the
        original's too."""
        empty: list[tuple[nn.Module, str, nn.Parameter | None]] = []

        def fill(module: nn.Module, leaf: str, values: Tensor) -> None:
            before = module._parameters[leaf]
            empty.append((module, leaf, before))
            module._parameters[leaf] = nn.Parameter(values.to(self.device), requires_grad=False)

        try:
            for name, values in self.source.values(names):
                path, _, leaf = name.rpartition(".")
                narrower = self.narrower.get(path)
                fill(self.model.get_submodule(path) if narrower is None else narrower.original, leaf, values)
                del values
            for path in self.narrower.keys() & {name.rpartition(".")[0] for name in names}:
                narrower = self.narrower[path]
                dtype = weight_of(narrower.original).dtype
                with safe_open(narrower.file, framework="pt") as file:
                    for leaf in file.keys():  # noqa: SIM118  not a mapping
                        fill(narrower.layer, leaf, file.get_tensor(leaf).to(dtype, copy=True))
            yield
        finally:
            for module, leaf, parameter in empty:
                module._parameters[leaf] = parameter
