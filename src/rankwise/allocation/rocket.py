"""ROCKET's allocation (2026, arXiv 2602.11008; code mts-ai/ROCKET): a multiple-choice knapsack on relative errors in the space
of the weights, whatever the metric of the factors.

min sum_l e_l(r_l)  s.t.  the budget and e_l(r_l) <= alpha * mean error,  e_l(r) = ||W - B_r A_r||_F / ||W||_F

The mean is over the matrices at the uniform rate. As in the code, alpha is the first of 1.0, 1.1, ... at which the cheapest
options below the cap meet the budget; where even the last does not (the code fails there) there is no cap.
Deviations: every rank is an option, not every twentieth of the rate; the factors are low-rank, not the paper's sparse ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.plan import Ranks, options, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.uniform import Uniform
from rankwise.layers.precision import exact


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rocket:
    """alphas: factors on the mean error that are tried as the cap, in this order."""

    decomposition: ClassVar[str] = "whitened"
    alphas: tuple[NonNegativeFloat, ...] = tuple(1 + i / 10 for i in range(11))

    def allocate(self, problem: Problem) -> Allocation:
        """The least sum of relative errors in which no matrix bears much more than the mean."""
        student = problem.student
        errors = {}
        for name in problem.shapes:
            factors = student.decompositions[name]
            W = student.weight(name)
            errors[name] = weight_errors(W, factors.second, factors.first).cpu().cummin(0).values
        least, alpha = self._cap(problem, errors)
        prices = {name: -error.diff() for name, error in errors.items()}
        forbidding = 1 + sum(error[0].item() for error in errors.values())  # more than all errors together
        for name, rank in least.items():
            prices[name][-1 if rank is None else rank - 1] += forbidding
        plan = Allocation.of_prefixes(knapsack(prices, problem.shapes, problem.budget), problem.spectra)
        return Allocation(plan.ranks, plan.masks, [{"step": "cap", "alpha": alpha}])

    def _cap(self, problem: Problem, errors: Mapping[str, Tensor]) -> tuple[Ranks, float]:
        """The smallest ranks below the cap of the first alpha that the budget has room for, and that alpha."""
        shapes, budget = problem.shapes, problem.budget
        uniform = Uniform().allocate(problem).ranks
        mean = sum(0.0 if r is None else errors[n][r].item() for n, r in uniform.items()) / len(uniform)
        least: Ranks = {}
        for alpha in (*self.alphas, math.inf):
            cap = math.inf if alpha == math.inf else alpha * mean
            for name, shape in shapes.items():
                least[name] = next(r for r in options(shape, budget.multiple) if r is None or errors[name][r] <= cap)
            if parameters(least, shapes) <= budget.parameters:
                break
        return least, alpha


@torch.no_grad()
def weight_errors(W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """||W - B_r A_r||_F / ||W||_F for r = 0, ..., k: [k + 1] float64; for W [m, n], B [m, k], A [k, n].

    ||W - B_r A_r||^2 = ||W||^2 - 2 sum_{i<r} b_i^T W a_i + sum_{i,j<r} (B^T B)_ij (A A^T)_ij
    """
    W, B, A = exact(W), exact(B), exact(A)
    mixed = (B * (W @ A.T)).sum(0).cumsum(0)
    square = ((B.T @ B) * (A @ A.T)).cumsum(0).cumsum(1).diagonal()
    energy = W.square().sum().clamp_min(torch.finfo(W.dtype).tiny)
    rest = (energy - 2 * mixed + square) / energy
    return torch.cat([rest.new_ones(1), rest.clamp_min(0)]).sqrt()
