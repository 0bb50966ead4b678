"""LLRC, our preset: ranks learned by gradient at the hard masks, then the kept masks' values.

1. Start: one backward pass prices every component (mask Fisher), and a knapsack with the dense option spends the budget.
2. Rounds: the gradient of KL(original || student) with respect to every mask weight, at the current hard masks, with
   the mask Fisher as curvature, prices each component as a Newton step would: keeping component i (mask 1) is worth
   -g_i + h_i, adding a dropped one (mask 0) is worth -g_i - h_i. Averaged with the prices before, they go to the knapsack
   again: the budget is met exactly at each step, and no penalty weight has to be tuned.
3. The state with the least KL on the selection text is kept, never worse than the start.
4. The kept masks' values are trained on the same KL and folded into the factors.

The idea of training nothing but masks over singular values, against the original model, is LLRC's (Sundrani et al. 2025,
arXiv 2512.13733); prices from gradients and curvature are Optimal Brain Damage's (LeCun et al. 1989).
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.problem import Allocation, Problem
from rankwise.masks.student import Masks
from rankwise.masks.values import ValueTraining, train_values

logger = logging.getLogger(__name__)
Prices = dict[str, Tensor]  # matrix -> [k] float64, nats per token


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LLRC:
    """rounds of re-pricing; steps of value training and its learning_rate. 0 rounds or steps leave that part out."""

    decomposition: ClassVar[str] = "kronecker"
    rounds: NonNegativeInt = 3
    value_steps: NonNegativeInt = 60
    learning_rate: PositiveFloat = 0.01

    def allocate(self, problem: Problem) -> Allocation:
        """The selection with the least KL on the selection text, its mask values trained."""
        student = problem.student
        curvature = student.fisher()
        prices = curvature
        best = choose(problem, prices)
        best_kl = student.divergence(best.masks)
        history: list[dict[str, Any]] = [{"step": "start", "kl": best_kl}]
        current = best
        for number in range(1, self.rounds + 1):
            gradients = student.gradients(current.masks)
            prices = {n: (prices[n] + worth(current.masks[n], gradients[n], curvature[n])) / 2 for n in prices}
            current = choose(problem, prices)
            kl = student.divergence(current.masks)
            history.append({"step": f"round {number}", "kl": kl})
            if kl < best_kl:
                best, best_kl = current, kl
        masks = best.masks
        if self.value_steps:
            trained = train_values(student, masks, ValueTraining(self.value_steps, self.learning_rate))
            kl = student.divergence(trained)
            history.append({"step": "values", "kl": kl})
            if kl < best_kl:
                masks, best_kl = trained, kl
        for record in history:
            logger.info("%s: KL %.5f on the selection text", record["step"], record["kl"])
        return Allocation(best.ranks, masks, history)


def worth(mask: Tensor | None, gradient: Tensor, curvature: Tensor) -> Tensor:
    """What each component [k] is worth in nats per token at the hard mask, to second order; never negative.

    mask: [k] of zeros and ones, None for all ones; gradient: dKL/dmask [k]; curvature: half the second derivative [k].
    """
    kept = torch.ones_like(gradient) if mask is None else mask.to(gradient)
    return (-gradient + (2 * kept - 1) * curvature).clamp_min(0)


def choose(problem: Problem, prices: Prices) -> Allocation:
    """Spend the budget on the dearest components, dense where that pays: any components, not only the first ones."""
    order = {name: price.argsort(descending=True, stable=True) for name, price in prices.items()}
    ranks = knapsack({n: prices[n][order[n]] for n in prices}, problem.shapes, problem.budget)
    masks: Masks = {}
    for name, rank in ranks.items():
        masks[name] = None
        if rank is not None:
            mask = torch.zeros(len(prices[name]))
            mask[order[name][:rank]] = 1
            masks[name] = mask
    return Allocation(ranks, masks)
