"""What every allocator works on, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankwise.allocation.offer import Offer
from rankwise.allocation.plan import Budget, Ranks, Shapes
from rankwise.masks.layers import Masks, hard_mask
from rankwise.masks.student import Student


@dataclass(frozen=True)
class Problem:
    """One budget to be spent on the decomposed matrices of one model.

    shapes: matrix -> shape.
    spectra: matrix -> singular values [k], descending, in the norm of the metric.
    student: the masked model, for allocators that ask the model itself. The seed is its.
    offers: what every matrix may be written as, where the budget is of bytes and bits are to be chosen too.
    levels: what a squared error of each matrix in the metric's norm costs, nats per token, where it was measured.
    """

    shapes: Shapes
    spectra: dict[str, Tensor]
    budget: Budget
    student: Student
    offers: Mapping[str, Offer] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """The ranks, and the mask of every compressed matrix: which components are kept and by how much each counts.

    history: what the allocator did, one record a step, for the report.
    effort: what it took: seconds, and tokens through the student, forward and backward.
    bits: of the matrices that are written in few: of a dense one its own, of one of low rank those of both factors.
    """

    ranks: Ranks
    masks: Masks
    history: list[dict[str, Any]] = field(default_factory=list)
    effort: dict[str, float] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_prefixes(cls, ranks: Ranks, spectra: dict[str, Tensor]) -> Allocation:
        """The first components of every matrix, as they are."""
        masks = {name: None if rank is None else hard_mask(rank, len(spectra[name])) for name, rank in ranks.items()}
        return cls(ranks, masks)
