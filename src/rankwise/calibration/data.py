"""Calibration text as batches, cut in three: to train on, to choose by, to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.calibration.batches import batches_of, refuse_unfit, sides
from rankwise.calibration.tokens import Batch, cut, refuse_foreign, sequences_in, with_decoder_inputs
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
        """Of windows [windows, length] in random order. Raises `RankwiseError` for those that the model does not read."""
        if windows.ndim != 2 or windows.is_floating_point() or not len(windows) or windows.shape[1] < 2:
            raise RankwiseError(
                "windows of tokens must be integers [windows, length] with a length of at least 2, "
                f"not {tuple(windows.shape)} {windows.dtype}",
            )
        windows = _input(windows)
        refuse_foreign(model, windows)
        refuse_unfit(model, dict.fromkeys(sides(model), windows[:1]))
        if len(windows) < 3:
            batches = batches_of(model, windows)
            return cls(batches, batches, batches, windows)
        part = max(1, len(windows) // PART)
        training, selection, measuring = windows[2 * part :], windows[:part], windows[part : 2 * part]
        return cls(batches_of(model, training), batches_of(model, selection), batches_of(model, measuring), windows)

    @classmethod
    def of_batches(cls, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Data:
        """Of the user's own batches, as they are; few ones are cut into their sequences first. Raises `RankwiseError` for what is
        none, and for those that the model does not read."""
        for batch in batches:
            if not isinstance(batch, Mapping) or not batch or not all(isinstance(t, Tensor) for t in batch.values()):
                raise RankwiseError(
                    "calibration batches must be dicts of model inputs: name -> tensor [sequences, ...]",
                )
        if not batches:
            raise RankwiseError("the calibration has no batches: give at least one")
        parts = [with_decoder_inputs(model, {name: _input(t) for name, t in batch.items()}) for batch in batches]
        refuse_unfit(model, parts[0])
        if len(parts) < PART:
            parts = [cut(batch, slice(i, i + 1)) for batch in parts for i in range(sequences_in(batch))]
        if len(parts) < 3:
            return cls(parts, parts, parts)
        selection, measuring = parts[::PART], parts[1::PART]
        training = [p for i, p in enumerate(parts) if i % PART > 1] or parts[2:]
        return cls(training, selection, measuring)


def _input(tensor: Tensor) -> Tensor:
    """As models read it: whole numbers, but for yes and no, in int64."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.detach().cpu().to(torch.int64 if whole else tensor.dtype)


def listed(calibration: Any) -> Any:
    """A calibration that may be asked for more than once: whatever can be gone through as a list, a batch as a list of one."""
    if isinstance(calibration, Mapping):
        return [calibration]
    one = isinstance(calibration, str | Tensor) or not isinstance(calibration, Iterable)
    return calibration if one else list(calibration)
