"""What each compressed matrix costs by itself: the KL with this one at its chosen mask and all others dense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankwise.calibration.tokens import Batch
from rankwise.masks.layers import Masks, is_whole
from rankwise.masks.student import Student
from rankwise.progress import progress

TOKENS = 2**18  # through the model, all matrices together: as many as one pass over the calibration text
LEAST, MOST = 2**7, 2**12  # through each


def costs_of_each(student: Student, masks: Masks, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
    """KL(original || one matrix compressed) in nats per token, by matrix, and the tokens that each was measured on.

    Of `batches` only the first tokens are read: 262,144 shared among the matrices, but from 128 to 4096 for each.
    """
    names = [name for name, mask in masks.items() if not is_whole(mask)]
    few = first_tokens(batches, min(MOST, max(LEAST, TOKENS // max(len(names), 1))))
    with student.frozen():
        tokens = sum(len(student.teacher(batch)) for batch in few)
    return {name: student.divergence({name: masks[name]}, few) for name in progress(names, "measuring each matrix alone")}, tokens


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
