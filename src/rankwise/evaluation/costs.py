"""What each compressed matrix costs by itself: the KL with this one at its chosen mask and all others dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankwise.calibration.batches import first_tokens
from rankwise.calibration.tokens import Batch
from rankwise.masks.layers import Masks, is_whole
from rankwise.masks.student import Student
from rankwise.progress import progress

TOKENS = 2**13  # through the model, all matrices together
LEAST, MOST = 2**5, 2**12  # through each


def costs_of_each(student: Student, masks: Masks, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
    """KL(original || one matrix compressed) in nats per token, by matrix, and the tokens that each was measured on.

    Of `batches` only the first tokens are read, see `tokens_of_each`. A matrix that is smaller than the original's is no part of
    a model by itself, and not among them.
    """
    names = [
        name for name, mask in masks.items() if name not in student.originals and (not is_whole(mask) or name in student.shipped)
    ]
    few = first_tokens(batches, tokens_of_each(len(names)))
    with student.exactly(), student.as_original():
        alone = replace(student, originals={})
        with student.frozen():
            tokens = sum(len(alone.teacher(batch)) for batch in few)
        return {
            name: alone.divergence({name: masks[name]}, few) for name in progress(names, "measuring each matrix alone")
        }, tokens


def tokens_of_each(matrices: int) -> int:
    """Tokens that a matrix is measured on: 8,192 shared among all, but from 32 to 4096."""
    return min(MOST, max(LEAST, TOKENS // max(matrices, 1)))
