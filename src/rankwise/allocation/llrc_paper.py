"""LLRC as published, as far as the public facts allow (arXiv 2512.13733): see `masks/gumbel.py` for the training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.plan import Budget, Ranks, Shapes, fill, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.masks.gumbel import GumbelTraining, train_logits
from rankwise.masks.layers import Masks

# A sample keeps a component with probability 1 - exp(-exp(logit)): above one half from this logit on.
KEPT = math.log(math.log(2))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LLRCPaper:
    """The paper's options. Where its sources leave one open, the comment says what we chose and why."""

    decomposition: ClassVar[str] = "activation"  # the paper: ASVD's diagonal scaling, alpha 0.5
    temperature: PositiveFloat = 0.1  # the paper
    first_logit: float = 6.0  # the paper: initialised in [3, 6], aligned with the singular values
    last_logit: float = 3.0
    learning_rate: PositiveFloat = 0.01  # the authors' script; the paper says AdamW
    sequences: PositiveInt = 4  # a step, as the authors' script
    steps_after_target: NonNegativeInt = 750  # the paper
    max_steps: PositiveInt = 4000  # open: a bound, so that an unreachable target ends; 1,400 steps are usual
    compression_low: NonNegativeFloat = 0.5  # open (alpha oscillates, bounds unknown): around 1, as the authors' R term
    compression_high: NonNegativeFloat = 1.5
    compression_period: PositiveInt = 100  # open: several cycles before the target, which takes 300 to 600 steps
    variation: NonNegativeFloat = 0.01  # open: weight of the total variation, taken on sigmoid(logits): smooth everywhere
    variation_warmup: NonNegativeInt = 300  # open ("fixed schedule"): rises while the logits are still saturated

    def allocate(self, problem: Problem) -> Allocation:
        """Any components whose mask ends above its threshold, repaired to the budget.

        The paper samples masks and thresholds at 0.5; we threshold the chance to be kept, so that the ranks are no random
        draw. Its "tiny compression stays dense" is our break-even rank.
        """
        shapes, budget = problem.shapes, problem.budget
        options = GumbelTraining(**dataclasses.asdict(self))

        def reached(logits: dict[str, Tensor]) -> bool:
            return parameters(ranks_above(KEPT, logits, shapes, budget.multiple), shapes) <= budget.parameters

        logits, history = train_logits(problem.student, options, reached)
        return repaired(logits, shapes, budget, history)


def ranks_above(threshold: float, logits: dict[str, Tensor], shapes: Shapes, multiple: int = 1) -> Ranks:
    """The ranks that keep the components whose logit exceeds `threshold`, dense from the break-even rank on."""
    ranks: Ranks = {}
    for name, t in logits.items():
        rank = max(int((t > threshold).sum()) // multiple, 1) * multiple
        ranks[name] = rank if rank <= shapes[name].largest_rank(multiple) else None
    return ranks


def repaired(logits: dict[str, Tensor], shapes: Shapes, budget: Budget, history: list[dict[str, Any]]) -> Allocation:
    """The plan of the lowest threshold, one for all matrices, whose components the budget has room for."""
    candidates = torch.cat([*logits.values()]).unique()  # ascending; parameters fall as the threshold rises
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        ranks = ranks_above(candidates[middle].item(), logits, shapes, budget.multiple)
        low, high = (low, middle) if parameters(ranks, shapes) <= budget.parameters else (middle + 1, high)
    ranks = ranks_above(candidates[low].item(), logits, shapes, budget.multiple)
    ranks = fill(ranks, shapes, budget, sorted(shapes, key=lambda n: -shapes[n].per_rank))
    masks: Masks = {}
    for name, rank in ranks.items():
        mask = torch.zeros(len(logits[name]))
        mask[logits[name].argsort(descending=True, stable=True)[:rank]] = 1
        masks[name] = None if rank is None else mask
    return Allocation(ranks, masks, history)
