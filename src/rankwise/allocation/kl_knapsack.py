"""KL knapsack: LEMS (2026, openreview IjIgNPFuCt; code lems-svd/lems). Each matrix's error curve has the shape of its
spectrum and the scale of one measured divergence.

    E(r) = sum_{i > r} sigma_i^2 / sum_i sigma_i^2                tail energy
    err(r) = KL(r0) E(r) / E(r0)                                  KL with this matrix alone at r0 = 0.1 of its break-even rank
    min sum_l d_l err_l(r_l) within the budget, dense included    d = 1 + gamma s_b: earlier blocks cost more
    s_b = sum_{k=b}^{B-1} (k+1)^-alpha, normalised to [0, 1]      b the matrix's block of B

alpha and gamma are those with the least real KL of a few trials. With several points c = KL / E is interpolated over r, linearly
in log c, and err = c E, made monotone.

Deviations: trials are a scrambled Sobol sequence, the first without bias, where the code asks Optuna; all ranks are options,
not only those from 0.3 to 0.95 of break-even; the KL is that of the whole window at temperature 1 (the code: 0.6, from
position 256 on). Both KLs are measured on the selection text, a tenth of the calibration, as the code's is an eighth;
those of single matrices on its first tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.energy import relative_energy
from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.masks.layers import hard_mask
from rankwise.progress import progress

FIRST_POINT, LAST_POINT = 0.1, 0.9  # of the break-even rank
MEASURED, LEAST_MEASURED = 2**17, 2**9  # tokens through all matrices together, and through each
PART_RUN = 0.55  # of the model, for one matrix: from the block it is in
LEAST = 1e-12  # a KL or an energy below this is rounding


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KLKnapsack:
    """points: ranks measured per matrix, at equal factors; trials: of the depth bias, the first is without one. tokens: what each
    matrix is measured on, by default 131,072 for all together, but 512 at least."""

    decomposition: ClassVar[str] = "kronecker"
    points: PositiveInt = 1
    trials: PositiveInt = 10
    largest_alpha: NonNegativeFloat = 3.0
    largest_gamma: NonNegativeFloat = 7.0
    tokens: PositiveInt | None = None

    def allocate(self, problem: Problem) -> Allocation:
        """One forward pass over the selection text per matrix and point, and one per trial."""
        return self.priced(problem)[0]

    def reads(self, training: Sequence[Batch], selection: Sequence[Batch], matrices: int) -> tuple[float, float]:
        """Tokens forward and back."""
        few = min(tokens_in(selection), self._tokens(matrices))
        return PART_RUN * matrices * self.points * few + self.trials * tokens_in(selection), 0.0

    def priced(self, problem: Problem) -> tuple[Allocation, dict[str, Tensor]]:
        """The plan, and the prices [k] in nats per token that it was bought at, the bias of the best trial in them."""
        few = first_tokens(problem.student.selection, self._tokens(len(problem.shapes)))
        with problem.student.exactly():
            unbiased = {name: self._prices(problem, name, few) for name in progress(problem.shapes, "measuring matrices")}
        best, best_prices, best_kl, history = None, unbiased, float("inf"), []
        for alpha, gamma in self._trials(problem.student.seed):
            bias = depth_bias(problem.shapes, alpha, gamma)
            prices = {name: bias[name] * price for name, price in unbiased.items()}
            plan = Allocation.of_prefixes(knapsack(prices, problem.shapes, problem.budget), problem.spectra)
            kl = problem.student.divergence(plan.masks)
            history.append({"step": f"alpha {alpha:.2f}, gamma {gamma:.2f}", "kl": kl})
            if best is None or kl < best_kl:
                best, best_prices, best_kl = plan, prices, kl
        assert best is not None
        return Allocation(best.ranks, best.masks, history), best_prices

    def _tokens(self, matrices: int) -> int:
        return self.tokens or tokens_of_each(matrices)

    def _prices(self, problem: Problem, name: str, text: Sequence[Batch]) -> Tensor:
        """The fall of the error curve [k] with each component, nats per token."""
        points = np.geomspace(FIRST_POINT, LAST_POINT, self.points) * problem.shapes[name].break_even
        ranks = np.unique(points.astype(int).clip(1))
        length = len(problem.spectra[name])
        measured = [problem.student.divergence_alone(name, hard_mask(rank, length), text) for rank in ranks.tolist()]
        return -error_curve(problem.spectra[name], ranks, measured).diff()

    def _trials(self, seed: int) -> list[list[float]]:
        """(alpha, gamma) of each trial."""
        draws = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(self.trials).double()
        draws[0] = 0
        return (draws * torch.tensor([self.largest_alpha, self.largest_gamma])).tolist()


def tokens_of_each(matrices: int) -> int:
    """Tokens that a matrix is measured on."""
    return max(LEAST_MEASURED, MEASURED // matrices)


def error_curve(spectrum: Tensor, ranks: Any, measured: list[float]) -> Tensor:
    """err(r) for r = 0, ..., k: [k + 1] float64, never rising, from the KLs `measured` at the rising `ranks`."""
    energy = relative_energy(spectrum)
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    scale = np.maximum(measured, LEAST) / tail[torch.as_tensor(ranks)].clamp_min(LEAST).numpy()
    factor = np.exp(np.interp(np.arange(len(tail)), ranks, np.log(scale)))
    return (torch.from_numpy(factor) * tail).cummin(0).values


def depth_bias(names: Iterable[str], alpha: float, gamma: float) -> dict[str, float]:
    """d of each matrix: 1 + gamma in the first block, 1 in the last and outside of blocks."""
    found = {name: re.search(r"\.(\d+)\.", name) for name in names}
    block = {name: int(match[1]) for name, match in found.items() if match}
    sums = np.cumsum(np.arange(1.0, max(block.values(), default=0) + 2)[::-1] ** -alpha)[::-1]
    share = (sums - sums[-1]) / max(sums[0] - sums[-1], LEAST)
    return {name: 1 + gamma * float(share[block[name]]) if name in block else 1.0 for name in found}
