"""Distillation: what is trained of all layers is trained at once on KL(original || compressed), end to end."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ConfigDict, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.masks.descent import Descent, descend, own_parts
from rankwise.masks.student import Layers, Student
from rankwise.refinement.trained import TrainedCodes, TrainedScales, in_training, scales_of, written


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Distil:
    """passes: how often the training text is read; tokens: of each step; learning_rate: of Adam, for a factor of one input whose
    root mean square is 1; in_bits: what it is multiplied by for whole numbers, where a small step that crosses the middle
    between two is a large one; of_scales: for the scales of paths, of which there are few."""

    passes: PositiveFloat = 1
    tokens: PositiveInt = 256
    learning_rate: PositiveFloat = 0.01
    in_bits: PositiveFloat = 0.2
    of_scales: PositiveFloat = 8

    def try_out(self, model: Any, matrices: Collection[str], batch: Batch) -> None:
        """Every model that masks are trained on can be refined so."""

    def trained(self, model: nn.Module, matrices: Collection[str]) -> list[str]:
        """All of them."""
        return list(matrices)

    def refine(self, student: Student, layers: Layers, losses: list[float]) -> dict[str, nn.Module]:
        """One forward pass of the original and one forward and back of the student per step."""
        trained = in_training(student, layers)
        if not trained:  # all is dense
            return dict(layers)
        steps = math.ceil(self.passes * tokens_in(student.training) / self.tokens)
        parts, add_gradients = own_parts(student, self.tokens), functools.partial(student.add_gradients, {**layers, **trained})
        options = Descent(steps, self.learning_rate, self.tokens, warm_up=0.1)
        scales = scales_of(trained, {TrainedCodes: self.in_bits, TrainedScales: self.of_scales})
        descend(student, parts, add_gradients, scales, options, "distilling", losses)
        return written(trained, layers)

    def reads(self, training: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward and back."""
        tokens = self.passes * tokens_in(training)
        return 2 * tokens, tokens
