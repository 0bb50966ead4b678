"""ARS, Adaptive Rank Selections (Gao et al., NAACL 2024, 2024.naacl-long.13): any components at first, drawn by a trained
hyper-network and pulled towards the first ones; in the end only how many they are counts. The masks and the terms of

    min  L_task + lambda R(T(m), p T_total) + gamma R_align

are in `masks/hypernetwork.py`. The authors published no code; constants are the paper's unless a comment says otherwise.

Deviations:
- The singular values in R_align are divided by their norm: ours are as large as the calibration text is long, and gamma = 10
  would mean another thing for every text.
- The count is the expectation of the paper's, sum_i P(m_i = 1), not one draw of it.
- In the end the counts are scaled by one factor until the budget is met, and a matrix at its break-even rank stays dense.
- The factors are not fine-tuned, and the basis is any of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.proportional import proportional
from rankwise.calibration.signal import device_of
from rankwise.masks.gumbel import chance, gumbel_sigmoid
from rankwise.masks.hypernetwork import HyperNetwork, excess, misalignment, size
from rankwise.masks.training import LossName, MaskTraining, objective_named, train_masks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ARS:
    """The paper's options, and the length of the training, which is ours."""

    decomposition: ClassVar[str] = "activation"  # the paper's IWSVD, as the public re-implementation (LLRC's author) has it
    temperature: PositiveFloat = 0.4
    bias: float = 3.0  # added to the logits: starts at full rank
    size_weight: NonNegativeFloat = 16.0  # lambda
    alignment_weight: NonNegativeFloat = 10.0  # gamma
    learning_rate: PositiveFloat = 0.001
    steps: PositiveInt = 600  # ours; the paper: 4,000
    sequences: PositiveInt = 4  # a step, as the re-implementation
    loss: LossName = "next-token"

    def allocate(self, problem: Problem) -> Allocation:
        """The first components of every matrix, as many as the trained masks keep of any."""
        student, shapes = problem.student, problem.shapes
        device = device_of(student.model)
        network = HyperNetwork({name: len(s) for name, s in problem.spectra.items()}, student.seed).to(device)
        generator = torch.Generator().manual_seed(student.seed)
        spectra = {name: (s / s.norm()).to(device, torch.float32) for name, s in problem.spectra.items()}

        def masks() -> dict[str, Tensor]:
            return {name: gumbel_sigmoid(o + self.bias, self.temperature, generator) for name, o in network().items()}

        def extra(_: int, drawn: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            kept, unaligned = size(drawn, shapes), misalignment(drawn, spectra)
            loss = self.size_weight * excess(kept, problem.budget.parameters) + self.alignment_weight * unaligned
            return loss, {"size": kept / problem.budget.parameters, "misalignment": unaligned}

        options = MaskTraining(self.steps, self.learning_rate, self.sequences)
        objective = objective_named(self.loss, student)
        history = train_masks(student, objective, network.parameters(), masks, extra, options, generator)
        with torch.no_grad():
            counts = {name: float(chance(o + self.bias).sum()) for name, o in network().items()}
        return proportional(problem, counts, history)
