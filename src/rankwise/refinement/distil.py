"""Distillation: all factors of the low-rank layers are trained at once on KL(original || compressed), end to end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import ConfigDict, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.layers.lowrank import LowRankLinear
from rankwise.masks.descent import Descent, descend
from rankwise.masks.student import Layers, Student
from rankwise.refinement.factors import TrainedFactors


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Distil:
    """passes: how often the training text is read; tokens: of each step; learning_rate: of Adam, for a factor of one input whose
    root mean square is 1."""

    passes: PositiveFloat = 2
    tokens: PositiveInt = 1024
    learning_rate: PositiveFloat = 0.005

    def refine(self, student: Student, layers: Layers, losses: list[float]) -> dict[str, nn.Module]:
        """One forward pass of the original and one forward and back of the student per step."""
        low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLinear)}
        if not low_rank:  # all is dense
            return dict(layers)
        trained = {name: TrainedFactors(layer) for name, layer in low_rank.items()}
        parameters: list[Tensor] = [parameter for factors in trained.values() for parameter in factors.parameters()]
        scales = {parameter: _scale(parameter) for parameter in parameters}
        steps = math.ceil(self.passes * tokens_in(student.training) / self.tokens)
        options = Descent(steps, self.learning_rate, self.tokens, warm_up=0.1)
        descend(student, {**layers, **trained}, scales, options, "distilling", losses)
        return {**layers, **{name: trained[name].written_as(layer) for name, layer in low_rank.items()}}

    def reads(self, training: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward and back."""
        tokens = self.passes * tokens_in(training)
        return 2 * tokens, tokens


def _scale(parameter: Tensor) -> float:
    """How large a step the parameter may take: in proportion to its numbers, and the smaller the more inputs add up, as all
    of them move at once (Yang et al. 2022, arXiv 2203.03466)."""
    return parameter.detach().square().mean().sqrt().item() / math.sqrt(parameter.shape[-1])
