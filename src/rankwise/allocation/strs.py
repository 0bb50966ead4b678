"""STRS, sensitivity-based truncation rank search (ASVD, Yuan et al. 2023, arXiv 2312.05821; code hahnyuan/ASVD4LLM).

Every matrix alone is truncated to every rate of a list, all others dense, and the loss is noted. Of all (matrix, rate, loss),
sorted by loss, the longest run from the harmless end that meets the budget is applied: each matrix takes its highest rate
in the run, and stays dense where it has none.

The loss is KL(original || truncated) on the training text; the paper takes the text's perplexity. That run is one threshold on
losses, and so is written as one: component i is kept where every measured rank that drops it loses more. Deviation: what the
coarse list of rates leaves of the budget is filled up rank by rank.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import by_threshold
from rankwise.calibration.tokens import Batch
from rankwise.masks.layers import hard_mask
from rankwise.progress import progress


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class STRS:
    """rates: fractions of a matrix's parameters to remove, that are tried; the paper's text has nine, its code 0.1 to 0.6.
    sequences: of training text, rounded up to whole batches."""

    decomposition: ClassVar[str] = "activation"
    rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    sequences: PositiveInt = 32

    def allocate(self, problem: Problem) -> Allocation:
        """One forward pass over the text per matrix and rate, then the search."""
        training = problem.student.training
        seen = accumulate((len(next(iter(batch.values()))) for batch in training), initial=0)
        text = [batch for batch, before in zip(training, seen, strict=False) if before < self.sequences]
        names = progress(problem.shapes, "truncating")
        with problem.student.exactly():
            losses = {name: self._losses(problem, name, text) for name in names}
        return by_threshold(problem, losses)

    def _losses(self, problem: Problem, name: str, text: list[Batch]) -> Tensor:
        """[k]: the least loss at a measured rank that drops component i, infinite where none does."""
        student, shape = problem.student, problem.shapes[name]
        losses = torch.full((len(problem.spectra[name]),), torch.inf, dtype=torch.float64)
        for rate in self.rates:
            rank = max(shape.rank_within(int(shape.dense * (1 - rate))), 1)
            loss = student.divergence_alone(name, hard_mask(rank, len(losses)), text)
            losses[rank:] = losses[rank:].clamp_max(loss)
        return losses
