"""What each compressed matrix costs by itself: the KL with this one at its chosen mask and all others dense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rankwise.calibration.signal import divergence, signal_of
from rankwise.calibration.tokens import Batch
from rankwise.masks.layers import Masks, is_whole
from rankwise.masks.student import Student
from rankwise.progress import progress

TOKENS = 2**18  # through the model, all matrices together: as many as one pass over the calibration text
LEAST, MOST = 2**7, 2**12  # through each


@torch.no_grad()
def costs_of_each(student: Student, masks: Masks, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
    """KL(original || one matrix compressed) in nats per token, by matrix, and the tokens that each was measured on.

    Of `batches` only the first tokens are read: 262,144 shared among the matrices, but from 128 to 4096 for each.
    """
    names = [name for name, mask in masks.items() if not is_whole(mask)]
    few = first_tokens(batches, min(MOST, max(LEAST, TOKENS // max(len(names), 1))))
    totals, tokens = dict.fromkeys(names, 0.0), 0
    with student.frozen():
        for batch in few:
            reference = signal_of(student.model, batch)
            tokens += len(reference)
            for name in progress(names, "measuring each matrix alone"):
                with student.with_masks({name: masks[name]}):
                    totals[name] += divergence(reference, signal_of(student.model, batch)).item()
    return {name: total / tokens for name, total in totals.items()}, tokens


def first_tokens(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """The first sequences, about so many tokens in all; a longer one is cut where all its inputs are of one shape."""
    few: list[Batch] = []
    for batch in batches:
        if tokens <= 0:
            break
        first = next(iter(batch.values()))
        length = first.shape[1] if first.ndim > 1 else 1
        part = {name: tensor[: max(1, tokens // length)] for name, tensor in batch.items()}
        if length > tokens and all(tensor.shape == first.shape for tensor in batch.values()):
            part = {name: tensor[:, :tokens] for name, tensor in part.items()}
        few.append(part)
        tokens -= length * len(next(iter(part.values())))
    return few
