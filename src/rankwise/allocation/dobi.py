"""Dobi-SVD (Wang et al., ICLR 2025, arXiv 2502.02723; code github.com/wangqinsi1/Dobi-SVD): one trainable position per matrix,
and the loss

    exp(L_CE) + lambda |ratio - target| + sum_l relu(-k_l)^2 + relu(k_l - K)^2.

Constants are the code's for plain low-rank products (without "remapping" to 8 bits) unless a comment says otherwise.

Deviations:
- The learning rate is counted in 2048ths of a matrix's components, as there (activations of 2048 tokens), but in no less than
  fifths of a component: beta = 10 gives a position a slope only within about 0.3 of a component, and on matrices with fewer than
  410 of them steps below one component stay caught there.
- The masks weigh the components of our decomposed weights, not those of each batch's activations, whose SVD needs a backward
  of its own; in the whitened basis the two are the same but for the text they are computed on.
- The cosine goes once from the first learning rate to the last; there it swings with every epoch.
- In the end positions are rounded and scaled by one factor until the budget is met; a matrix at its break-even rank stays dense.
- The weights are not updated afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.plan import parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.proportional import proportional
from rankwise.calibration.signal import device_of
from rankwise.masks.position import position_mask, range_penalty
from rankwise.masks.training import LossName, MaskTraining, objective_named, train_masks

UNITS = 2048  # positions of a matrix: K above
SMALLEST_UNIT = 0.2  # of a component
SIZE_WEIGHTS = {0.4: 400.0, 0.6: 200.0, 0.8: 150.0}  # fraction kept -> lambda, for Llama-2-7B
PERPLEXITY = 5.47  # Llama-2-7B's own on WikiText-2, the text of these lambdas


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Dobi:
    """The code's options, and the length of the training, which is ours."""

    decomposition: ClassVar[str] = "whitened"  # the counterpart of the SVD of activations
    beta: PositiveFloat = 10.0
    size_weight: NonNegativeFloat | None = None  # lambda; None: the published one, between rates in proportion
    learning_rate: PositiveFloat = 5.0
    final: NonNegativeFloat = 0.8  # 5 -> 4
    steps: PositiveInt = 400  # 50 epochs of 260 texts on 4 GPUs, 8 batches a step, are about as many
    sequences: PositiveInt = 4  # a step, ours; there 32 of 2048 tokens
    loss: LossName = "next-token"

    def allocate(self, problem: Problem) -> Allocation:
        """The first components of every matrix up to its trained position."""
        student, shapes, budget = problem.student, problem.shapes, problem.budget
        device = device_of(student.model)
        full = {name: len(s) for name, s in problem.spectra.items()}
        length = torch.tensor([float(k) for k in full.values()], device=device)
        dense = torch.tensor([float(shapes[name].dense) for name in full], device=device)
        unit = (length / UNITS).clamp_min(SMALLEST_UNIT)  # components
        target = budget.parameters / parameters(dict.fromkeys(shapes), shapes)
        uniform = torch.tensor([shapes[name].rank_of(target * shapes[name].dense) for name in full], device=device)
        positions = (uniform / unit).requires_grad_(True)
        objective = objective_named(self.loss, student).exponentiated()
        weight = self.size_weight
        if weight is None:
            weight = float(np.interp(target, list(SIZE_WEIGHTS), list(SIZE_WEIGHTS.values())))
            weight /= PERPLEXITY if objective.wanted else 1  # exp KL is a perplexity over the original's

        def masks() -> dict[str, Tensor]:
            ends = (positions * unit).unbind()
            return {name: position_mask(end, full[name], self.beta) for name, end in zip(full, ends, strict=True)}

        def extra(_: int, drawn: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            ends = (positions * unit).minimum(length).unbind()
            sizes = torch.stack([shapes[name].numbers(end) for name, end in zip(full, ends, strict=True)])
            ratio = sizes.minimum(dense).sum() / dense.sum()
            return weight * (ratio - target).abs() + range_penalty(positions, length / unit), {"ratio": ratio}

        options = MaskTraining(self.steps, self.learning_rate, self.sequences, self.final)
        generator = torch.Generator().manual_seed(student.seed)
        history = train_masks(student, objective, [positions], masks, extra, options, generator)
        ranks = (positions.detach() * unit).round().clamp_min(1).minimum(length)
        return proportional(problem, dict(zip(full, ranks.tolist(), strict=True)), history)
