"""LLRC's mask training as the paper describes it: one logit per singular value, Gumbel-sigmoid samples with a
straight-through gradient, distillation of hidden states, a compression loss and a total variation.

Sundrani, Tudisco, Minervini: Low-Rank Compression of Language Models via Differentiable Rank Selection, arXiv 2512.13733.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rankwise.calibration.signal import call, token_mask
from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError
from rankwise.layers.linear import swapped
from rankwise.masks.student import Student

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
    return (soft > 0.5).to(soft) + soft - soft.detach()


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
    lengths = {name: len(d.spectrum) for name, d in student.decompositions.items()}
    layers = student.masked({name: torch.ones(k) for name, k in lengths.items()})
    logits = {
        name: torch.linspace(options.first_logit, options.last_logit, k).to(layers[name].mask.device).requires_grad_(True)
        for name, k in lengths.items()
    }
    optimiser = torch.optim.AdamW(logits.values(), lr=options.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(student.seed)
    batches = _endless(student.training, options.sequences, generator)
    history: list[dict[str, Any]] = []
    remaining: int | None = None
    with student.frozen():
        bar = tqdm(range(options.max_steps), desc="training masks (paper)")
        for step in bar:
            at_target = reached({n: t.detach().cpu() for n, t in logits.items()})
            if at_target and remaining is None:
                remaining = options.steps_after_target
            if remaining is not None:
                if remaining == 0:
                    break
                remaining -= 1
            batch = next(batches)
            with torch.no_grad():
                wanted = _hidden_states(student.model, batch)
            for name, layer in layers.items():
                layer.mask = gumbel_sigmoid(logits[name], options.temperature, generator)
            with swapped(student.model, layers):
                got = _hidden_states(student.model, batch)
            distillation = sum(((g - w).square().mean() / w.var() for g, w in zip(got, wanted, strict=True)), torch.zeros(()))
            low, high = options.compression_low, options.compression_high
            alpha = 0.0 if at_target else cycle(step, low, high, options.compression_period)
            beta = options.variation * min(1.0, step / max(options.variation_warmup, 1))
            compression = torch.stack([t.mean() for t in logits.values()]).mean()
            variation = torch.stack([total_variation(t) for t in logits.values()]).mean()
            loss = distillation + alpha * compression + beta * variation
            loss.backward()
            student.effort["forward_tokens"] += 2 * len(wanted[0])
            student.effort["backward_tokens"] += len(wanted[0])
            optimiser.step()
            optimiser.zero_grad()
            if step % 50 == 0:
                record = {"step": step, "distillation": float(distillation), "mean logit": float(compression)}
                history.append(record)
                bar.set_postfix(distillation=f"{record['distillation']:.4f}", logit=f"{record['mean logit']:.2f}")
    return {name: tensor.detach().cpu() for name, tensor in logits.items()}, history


def _endless(batches: Sequence[Batch], sequences: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of `sequences` sequences, in a new random order each time round."""
    parts = [
        {name: tensor[i : i + sequences] for name, tensor in batch.items()}
        for batch in batches
        for i in range(0, len(next(iter(batch.values()))), sequences)
    ]
    while True:
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[index]


def _hidden_states(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """The hidden states [tokens, hidden] float32 after the middle layer and before the head."""
    output = call(model, batch, output_hidden_states=True)
    states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    if not states:
        raise RankwiseError(f"{type(model).__name__} gives no hidden states: use another preset")
    mask = token_mask(batch)
    picked = [states[len(states) // 2], states[-1]]
    return [(s if mask is None else s[mask.to(s.device)]).float().flatten(0, -2) for s in picked]
