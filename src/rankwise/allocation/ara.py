"""ARA, Adaptive Rank Allocation (Xv et al., arXiv 2510.19389): a mask per matrix that falls along the components by
construction, the dense matrix in its place from the break-even rank on, and the loss

    L_CE + lambda_1 L_g + lambda_2 |ratio - target|.

The paper's text gives the staircase, the dense switch, the terms and the final rescaling. Its formulas and constants were not to
be had. Reconstructed, and so ours:
- the binary mask: the first round(sum p) components, with the gradient of p (`masks/staircase.py`);
- L_g = mean over matrices of min(max(1 - R, 0), band), R = k (m + n) / (m n): between 1 - band and 1 a matrix costs nearly as
  much as dense and serves worse, so it is drawn up; elsewhere the term has no slope;
- the ratio counts a matrix at most once, as dense, but with the slope of R: a dense matrix can come down again;
- every constant below.
In the end a matrix that trained as dense counts with all its components, the others with sum p; one factor for all meets the
budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.plan import parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.proportional import proportional
from rankwise.calibration.signal import device_of
from rankwise.masks.staircase import staircase, staircase_mask
from rankwise.masks.training import LossName, MaskTraining, objective_named, train_masks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ARA:
    """All constants are ours; the paper trains several epochs on 256 texts of 512 tokens."""

    decomposition: ClassVar[str] = "whitened"  # the paper
    stairs: PositiveInt = 32  # D
    learning_rate: PositiveFloat = 0.2
    final: NonNegativeFloat = 0.1  # the last learning rate over the first
    steps: PositiveInt = 400
    sequences: PositiveInt = 4  # a step
    guidance: NonNegativeFloat = 1.0  # lambda_1
    band: PositiveFloat = 0.25
    size_weight: NonNegativeFloat = 10.0  # lambda_2
    loss: LossName = "next-token"

    def allocate(self, problem: Problem) -> Allocation:
        """The first components of every matrix, as many as its trained chances sum up to."""
        student, shapes, budget = problem.student, problem.shapes, problem.budget
        device = device_of(student.model)
        stairs = {name: staircase(min(self.stairs, len(s)), len(s)).to(device) for name, s in problem.spectra.items()}
        thetas = {name: torch.zeros(len(B), device=device, requires_grad=True) for name, B in stairs.items()}
        dense = torch.tensor([float(shapes[name].dense) for name in thetas], device=device)
        target = budget.parameters / parameters(dict.fromkeys(shapes), shapes)

        def kept() -> dict[str, Tensor]:
            return {name: theta.softmax(0) @ stairs[name] for name, theta in thetas.items()}

        def masks() -> dict[str, Tensor]:
            return {name: staircase_mask(p, shapes[name].largest_rank()) for name, p in kept().items()}

        def extra(_: int, drawn: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            R = torch.stack([shapes[name].numbers(p.sum()) for name, p in kept().items()]) / dense
            ratio = ((R - (R - 1).clamp_min(0).detach()) * dense).sum() / dense.sum()
            guidance = (1 - R).clamp(0, self.band).mean()
            loss = self.guidance * guidance + self.size_weight * (ratio - target).abs()
            return loss, {"ratio": ratio, "guidance": guidance}

        options = MaskTraining(self.steps, self.learning_rate, self.sequences, self.final)
        generator = torch.Generator().manual_seed(student.seed)
        objective = objective_named(self.loss, student)
        history = train_masks(student, objective, thetas.values(), masks, extra, options, generator)
        with torch.no_grad():
            counts = {name: float(mask.sum()) for name, mask in masks().items()}
        return proportional(problem, counts, history)
