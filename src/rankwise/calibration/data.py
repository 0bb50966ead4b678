"""Calibration text as batches, cut in three: to train on, to choose by, to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.calibration.batches import batches_of
from rankwise.calibration.tokens import Batch, refuse_foreign, with_decoder_inputs
from rankwise.errors import RankwiseError

PART = 10  # one sequence in ten is for choosing, another one in ten for measuring


@dataclass(frozen=True)
class Data:
    """Disjoint batches, unless there are fewer than three sequences: then all three are the same.

    windows: the text [windows, length] that they were made of, where it was no batches.
    conversations: how many the text holds, which were put in the model's chat template or begun from it.
    """

    training: list[Batch]
    selection: list[Batch]
    measuring: list[Batch]
    windows: Tensor | None = None
    conversations: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Everything in the training and selection batches, in order: what a result depends on."""
        return [tensor for batch in (*self.training, *self.selection) for tensor in batch.values()]

    @classmethod
    def of_windows(cls, model: nn.Module, windows: Tensor) -> Data:
        """Of windows [windows, length] in random order."""
        if windows.ndim != 2 or windows.is_floating_point() or not len(windows) or windows.shape[1] < 2:
            raise RankwiseError(
                f"windows of tokens are integers [windows, length], length 2 or more, not {tuple(windows.shape)} {windows.dtype}"
            )
        refuse_foreign(model, windows)
        if len(windows) < 3:
            batches = batches_of(model, windows)
            return cls(batches, batches, batches, windows)
        part = max(1, len(windows) // PART)
        training, selection, measuring = windows[2 * part :], windows[:part], windows[part : 2 * part]
        return cls(batches_of(model, training), batches_of(model, selection), batches_of(model, measuring), windows)

    @classmethod
    def of_batches(cls, model: nn.Module, batches: Sequence[Batch]) -> Data:
        """Of the user's own batches, as they are; few ones are cut into their sequences first."""
        for batch in batches:
            if not isinstance(batch, dict) or not all(isinstance(t, torch.Tensor) for t in batch.values()):
                raise RankwiseError("calibration batches are dicts of the model's inputs: name -> tensor [sequences, ...]")
        if not batches:
            raise RankwiseError("the calibration has no batches")
        parts = [with_decoder_inputs(model, batch) for batch in batches]
        if len(parts) < PART:
            parts = [
                {name: tensor[i : i + 1] for name, tensor in batch.items()}
                for batch in parts
                for i in range(len(next(iter(batch.values()))))
            ]
        if len(parts) < 3:
            return cls(parts, parts, parts)
        selection, measuring = parts[::PART], parts[1::PART]
        training = [p for i, p in enumerate(parts) if i % PART > 1] or parts[2:]
        return cls(training, selection, measuring)
