"""The best model in so many bytes: for every matrix a rank or a number of bits, one knapsack over both.

What writing matrix l in one way costs is predicted from its squared error E in the metric's norm, however the error comes about:

    KL_l(E) = c_l(E) E          c_l, KL over error, is measured with l alone at a few ranks, as by `kl_knapsack.py`, and
                                interpolated between their errors, linearly in log c over log E

so that one measurement serves ranks and bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from rankwise.allocation.kl_knapsack import FIRST_POINT, LAST_POINT, LEAST, PART_RUN, tokens_of_each
from rankwise.allocation.multiple_choice import Floats, solve
from rankwise.allocation.offer import tail_of
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.errors import RankwiseError
from rankwise.masks.layers import hard_mask
from rankwise.progress import progress

RELATIVE_GAP = 1e-3  # far below the error of any price


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Mixed:
    """points: ranks measured per matrix. tokens: what each is measured on, by default 131,072 for all together, but 512 at
    least."""

    decomposition: ClassVar[str] = "kronecker"
    points: PositiveInt = 2
    tokens: PositiveInt | None = None

    def allocate(self, problem: Problem) -> Allocation:
        """One forward pass over the selection text per matrix and point."""
        if not problem.offers:
            raise RankwiseError(
                "mixed shares out bytes among ranks and bits: name no other allocation beside it",
            )
        few = first_tokens(problem.student.selection, self._tokens(len(problem.shapes)))
        offers = [problem.offers[name] for name in problem.shapes]
        losses = []
        with problem.student.exactly():
            for name, offer in zip(progress(problem.shapes, "measuring matrices"), offers, strict=True):
                losses.append(kl_of_errors(offer.errors, *self._measured(problem, name, few)))
        positions = solve([offer.bytes for offer in offers], losses, problem.budget.parameters, RELATIVE_GAP).tolist()
        chosen = {name: offer.ways[at] for name, offer, at in zip(problem.shapes, offers, positions, strict=True)}
        predicted = sum(float(loss[at]) for loss, at in zip(losses, positions, strict=True))
        masks = {n: None if rank is None else hard_mask(rank, len(problem.spectra[n])) for n, (rank, _) in chosen.items()}
        return Allocation(
            {name: rank for name, (rank, _) in chosen.items()},
            masks,
            [{"step": "sum over matrices, each alone", "kl": predicted}],
            bits={name: bits for name, (_, bits) in chosen.items()},
        )

    def reads(self, training: Sequence[Batch], selection: Sequence[Batch], matrices: int) -> tuple[float, float]:
        """Tokens forward and back."""
        return PART_RUN * matrices * self.points * min(tokens_in(selection), self._tokens(matrices)), 0.0

    def _tokens(self, matrices: int) -> int:
        return self.tokens or tokens_of_each(matrices)

    def _measured(self, problem: Problem, name: str, text: Sequence[Batch]) -> tuple[Floats, Floats]:
        """The squared errors of a few ranks, rising, and the KL of each, nats per token."""
        spectrum = problem.spectra[name]
        points = np.geomspace(FIRST_POINT, LAST_POINT, self.points) * problem.shapes[name].break_even
        ranks = np.unique(points.astype(int).clip(1))[::-1]
        kls = [problem.student.divergence_alone(name, hard_mask(rank, len(spectrum)), text) for rank in ranks.tolist()]
        return tail_of(spectrum)[ranks], np.array(kls)


def kl_of_errors(errors: Floats, known: Floats, measured: Floats) -> Floats:
    """The KL of each squared error, from the KLs `measured` at the rising errors `known`; it never falls with the error."""
    known, measured = np.maximum(known, LEAST), np.maximum(measured, LEAST)
    factor = np.exp(np.interp(np.log(np.maximum(errors, LEAST)), np.log(known), np.log(measured / known)))
    order, found = np.argsort(errors), np.empty_like(errors)
    found[order] = np.maximum.accumulate((factor * errors)[order])
    return found
