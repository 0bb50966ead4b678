"""LLRC's mask training as the paper describes it: one logit per singular value, Gumbel-sigmoid samples with a
straight-through gradient, distillation of hidden states, a compression loss and a total variation.

Sundrani, Tudisco, Minervini: Low-Rank Compression of Language Models via Differentiable Rank Selection, arXiv 2512.13733.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.calibration.signal import call, device_of, token_mask
from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError
from rankwise.masks.student import Student
from rankwise.masks.training import MaskTraining, Objective, train_masks

EPSILON = 1e-20


@dataclass(frozen=True)
class GumbelTraining:
    """The training's options; `LLRCPaper` says where each comes from."""

    temperature: float
    first_logit: float
    last_logit: float
    learning_rate: float
    sequences: int
    steps_after_target: int
    max_steps: int
    compression_low: float
    compression_high: float
    compression_period: int
    variation: float
    variation_warmup: int


def gumbel_sigmoid(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A hard sample [k] of zeros and ones, with the gradient of the soft one (straight through).

    y = sigmoid((logit + g) / temperature) with one Gumbel noise g per logit, as the authors' code; hard = 1[y > 0.5].
    """
    uniform = torch.rand(logits.shape, generator=generator).to(logits.device)
    noise = -torch.log(-torch.log(uniform + EPSILON) + EPSILON)
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft > 0.5).to(soft) + (soft - soft.detach())  # in this order the sum is exact


def chance(logits: Tensor) -> Tensor:
    """P(a sample keeps it) = P(g > -logit) = 1 - exp(-exp(logit)), element by element."""
    return -torch.expm1(-logits.exp())


def total_variation(logits: Tensor) -> Tensor:
    """sum_i |p_{i+1} - p_i| over p = sigmoid(logits): 1 at the least for a mask that falls from 1 to 0."""
    return torch.sigmoid(logits).diff().abs().sum()


def cycle(step: int, low: float, high: float, period: int) -> float:
    """A weight that oscillates between `low` and `high`, starting low (after cyclical annealing, Fu et al. 2019)."""
    return low + (high - low) * (0.5 - 0.5 * math.cos(2 * math.pi * step / period))


def train_logits(
    student: Student, options: GumbelTraining, reached: Callable[[dict[str, Tensor]], bool]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train the logits (matrix -> [k] float32, on the CPU) until `steps_after_target` steps after `reached(logits)` first
    holds, and at most `max_steps`; also one record per 50 steps.

    The compression loss rests while the target is held, as in the authors' code: else it would push on past it.
    """
    device = device_of(student.model)
    logits = {
        name: torch.linspace(options.first_logit, options.last_logit, len(d.spectrum)).to(device).requires_grad_(True)
        for name, d in student.decompositions.items()
    }
    generator = torch.Generator().manual_seed(student.seed)
    at_target, remaining = False, options.steps_after_target

    def done() -> bool:
        nonlocal at_target, remaining
        at_target = reached({n: t.detach().cpu() for n, t in logits.items()})
        if at_target or remaining < options.steps_after_target:
            remaining -= 1
        return remaining < 0

    def masks() -> dict[str, Tensor]:
        return {name: gumbel_sigmoid(t, options.temperature, generator) for name, t in logits.items()}

    def extra(step: int, _: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        low, high = options.compression_low, options.compression_high
        alpha = 0.0 if at_target else cycle(step, low, high, options.compression_period)
        beta = options.variation * min(1.0, step / max(options.variation_warmup, 1))
        compression = torch.stack([t.mean() for t in logits.values()]).mean()
        variation = torch.stack([total_variation(t) for t in logits.values()]).mean()
        return alpha * compression + beta * variation, {"mean logit": compression}

    training = MaskTraining(options.max_steps, options.learning_rate, options.sequences)
    objective = Objective("distillation", _distillation, _hidden_states)
    history = train_masks(student, objective, logits.values(), masks, extra, training, generator, done)
    return {name: tensor.detach().cpu() for name, tensor in logits.items()}, history


def _distillation(model: torch.nn.Module, batch: Batch, wanted: list[Tensor]) -> Tensor:
    """The squared error of the hidden states relative to their variance, summed over the two places."""
    got = _hidden_states(model, batch)
    return torch.stack([(g - w).square().mean() / w.var() for g, w in zip(got, wanted, strict=True)]).sum()


def _hidden_states(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """The hidden states [tokens, hidden] float32 after the middle layer and before the head."""
    output = call(model, batch, output_hidden_states=True)
    states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    if not states:
        raise RankwiseError(f"{type(model).__name__} gives no hidden states: use another preset")
    mask = token_mask(batch)
    picked = [states[len(states) // 2], states[-1]]
    return [(s if mask is None else s[mask.to(s.device)]).float().flatten(0, -2) for s in picked]
