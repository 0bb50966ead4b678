"""One training loop for every mask that is learned: what differs between the methods is given to it as functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.calibration.signal import cross_entropy, divergence, signal_of, text_labels, token_mask
from rankwise.calibration.tokens import Batch, endless, parts_of, written
from rankwise.layers.linear import swapped
from rankwise.masks.student import Student
from rankwise.progress import progress

RECORD_EVERY = 50
LossName = Literal["next-token", "kl"]


@dataclass(frozen=True)
class Objective:
    """What the student shall do well on a batch.

    loss: (the student, a batch, what was wanted) -> a scalar, a mean over tokens.
    wanted: (the original, a batch) -> whatever `loss` compares with; None where the text alone says it.
    """

    name: str
    loss: Callable[[nn.Module, Batch, Any], Tensor]
    wanted: Callable[[nn.Module, Batch], Any] | None = None

    def exponentiated(self) -> Objective:
        """exp of the loss: the perplexity, where the loss is the text's. Capped at exp 30, lest one bad step overflow."""
        return Objective(f"exp {self.name}", lambda *arguments: self.loss(*arguments).clamp_max(30).exp(), self.wanted)


@dataclass(frozen=True)
class MaskTraining:
    """Adam on batches of `sequences`, its learning rate going along a half cosine to `final` times what it was."""

    steps: int
    learning_rate: float
    sequences: int
    final: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate at `step`, as a factor."""
        return self.final + (1 - self.final) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def train_masks(
    student: Student,
    objective: Objective,
    parameters: Iterable[Tensor],
    masks: Callable[[], Mapping[str, Tensor]],
    extra: Callable[[int, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    options: MaskTraining,
    generator: torch.Generator,
    done: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Minimise objective + extra in the parameters, until `done` or for `steps` steps; one record per 50 steps.

    masks: () -> a mask [k] for every matrix, differentiable in the parameters; drawn anew at each step.
    extra: (step, its masks) -> the loss beside the objective, and what to note of it. `generator` orders the batches.
    """
    layers = student.masked({name: torch.ones(len(d.spectrum)) for name, d in student.decompositions.items()})
    optimiser = torch.optim.Adam(parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, options.rate)
    batches = endless(parts_of(student.training, options.sequences), generator)
    history: list[dict[str, Any]] = []
    with student.frozen():
        bar = progress(range(options.steps), "training masks")
        for step in bar:
            if done():
                break
            batch = next(batches)
            with torch.no_grad():
                wanted = objective.wanted(student.model, batch) if objective.wanted else None
            drawn = masks()
            for name, layer in layers.items():
                layer.mask = drawn[name]
            with swapped(student.model, layers):
                loss = objective.loss(student.model, batch, wanted)
            others, notes = extra(step, drawn)
            (loss + others).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            tokens = _tokens(batch)
            student.effort["forward_tokens"] += tokens * (2 if objective.wanted else 1)
            student.effort["backward_tokens"] += tokens
            if step % RECORD_EVERY == 0:
                noted = {objective.name: loss.item()} | {name: value.item() for name, value in notes.items()}
                history.append({"step": step} | noted)
                bar.set_postfix({name: f"{value:.4f}" for name, value in noted.items()})
    return history


def objective_named(name: LossName, student: Student) -> Objective:
    """The loss on the text ("next-token"), where the student predicts the tokens of one; else the KL to the original ("kl")."""
    causal = getattr(student.model, "can_generate", lambda: False)()
    has_text = {"input_ids", "decoder_input_ids"} & student.training[0].keys()
    if name == "next-token" and causal and has_text:
        return Objective("next-token loss", next_token_loss)
    return Objective("kl", _mean_divergence, signal_of)


def next_token_loss(model: nn.Module, batch: Batch, wanted: None = None) -> Tensor:
    """Cross entropy of each next token of the text, nats per token; tokens beside padding do not count."""
    signal, labels = signal_of(model, batch), text_labels(batch, causal=True)
    return cross_entropy(signal, labels) / (labels >= 0).sum().item()


def _mean_divergence(model: nn.Module, batch: Batch, wanted: Any) -> Tensor:
    return divergence(wanted, signal_of(model, batch)) / len(wanted)


def _tokens(batch: Batch) -> int:
    """Tokens on the side that writes, without padding."""
    mask = token_mask(batch)
    return written(batch).shape[:2].numel() if mask is None else int(mask.sum())
