"""Hidden states that flow from block to block: in memory up to a budget, the others on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Room:
    """Bytes that all hidden states together may still take in memory, and the folder for the others."""

    folder: Path
    bytes: int


@dataclass
class Activations:
    """A list of tensors, each set any number of times; a tensor keeps its place, in memory or on disk."""

    name: str
    room: Room
    _kept: dict[int, Tensor | Path] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if isinstance(kept, Tensor):
            return kept
        with safe_open(kept, framework="pt") as file:  # a copy: mapped pages would count as memory
            tensor: Tensor = file.get_tensor("hidden").clone()
        return tensor

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        hidden = hidden.detach().cpu()
        before = self._kept.get(index)
        if before is None and hidden.nbytes <= self.room.bytes:
            self.room.bytes -= hidden.nbytes
        elif not isinstance(before, Tensor):
            self.room.folder.mkdir(parents=True, exist_ok=True)
            file = self.room.folder / f"{self.name}-{index:06d}.safetensors"
            save_file({"hidden": hidden.contiguous()}, file)
            self._kept[index] = file
            return
        self._kept[index] = hidden

    def clear(self) -> None:
        """Give the room back."""
        for kept in self._kept.values():
            if isinstance(kept, Tensor):
                self.room.bytes += kept.nbytes
            else:
                kept.unlink(missing_ok=True)
        self._kept.clear()
