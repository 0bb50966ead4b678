"""Training the values of the kept masks: no component is added or dropped and no weight is touched, but each kept component
learns how much of itself serves the original model's outputs best. Those of dense matrices too. Folded into the factors, or
into the dense weight, the values cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise import distributed
from rankwise.calibration.signal import Signal, divergence, signal_of
from rankwise.calibration.tokens import Batch, endless
from rankwise.layers.linear import swapped
from rankwise.masks.layers import MaskedLinear, Masks, WeightedLinear, add, is_whole
from rankwise.masks.student import TEACHER_BYTES, Student
from rankwise.progress import progress


@dataclass(frozen=True)
class ValueTraining:
    """Adam on the mask values, its learning rate falling linearly to zero; every step reads `tokens`, or one sequence."""

    steps: int = 120
    learning_rate: float = 0.01
    tokens: int = 2048
    betas: tuple[float, float] = (0.9, 0.95)


def train_values(student: Student, masks: Masks, options: ValueTraining, losses: list[float] | None = None) -> Masks:
    """The masks with their non-zero weights, and those of the dense matrices, trained on KL(original || student) over the
    training batches, in an order drawn from the student's seed. The loss of each step, nats per token, is added to `losses`."""
    if not options.steps or all(mask is None for mask in masks.values()):
        return masks
    full = {name: torch.ones(len(d.spectrum)) for name, d in student.decompositions.items()}
    given = full | {name: mask for name, mask in masks.items() if mask is not None}
    layers = {name: _layer(student, name, mask) for name, mask in given.items()}
    optimiser = torch.optim.Adam([layer.mask for layer in layers.values()], lr=options.learning_rate, betas=options.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / options.steps)
    sequences = max(1, options.tokens // next(iter(student.training[0].values()))[0].numel())
    batches = endless(student.training, sequences, torch.Generator().manual_seed(student.seed))
    known: dict[int, Signal] = {}
    with student.frozen(), student.together():
        bar = progress(range(options.steps), "training mask values")
        for _ in bar:
            loss = _set_gradients(student, layers, next(batches), known)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            if losses is not None:
                losses.append(loss)
            bar.set_postfix(kl=f"{loss:.5f}", refresh=False)
    trained: Masks = {}
    for name, mask in given.items():
        values = layers[name].mask.detach().float().cpu()
        values[values == 0] = torch.finfo(torch.float32).tiny  # a kept component stays one
        trained[name] = mask.float().masked_scatter(mask != 0, values)
    return trained


def _set_gradients(
    student: Student, layers: Mapping[str, MaskedLinear | WeightedLinear], batch: Batch, known: dict[int, Signal]
) -> float:
    """Give the masks the gradient of the mean KL over the batch, of which every process reads its sequences; the mean KL.

    known: what the original says to this process's part of a batch, of which there are not many; as many as there is room for.
    """
    own = {name: tensor[distributed.rank() :: distributed.size()] for name, tensor in batch.items()}
    loss, tokens = 0.0, 0
    if len(next(iter(own.values()))):
        reference = known.get(id(batch)) or student.teacher(own)
        if reference.values.nbytes * (len(known) + 1) <= TEACHER_BYTES:
            known[id(batch)] = reference
        with swapped(student.model, layers):
            own_loss = divergence(reference, signal_of(student.model, own))
        own_loss.backward()
        student.count(reference, backward=True)
        loss, tokens = own_loss.item(), len(reference.values)
    masks = [layer.mask for layer in layers.values()]
    gradients = torch.cat([torch.zeros_like(mask) if mask.grad is None else mask.grad for mask in masks])
    loss, tokens = distributed.add_up(torch.tensor([loss, tokens], dtype=torch.float64)).tolist()
    gradients = distributed.add_up(gradients) / tokens
    for mask, gradient in zip(masks, gradients.split([len(mask) for mask in masks]), strict=True):
        mask.grad = gradient
    return loss / tokens


def _layer(student: Student, name: str, mask: Tensor) -> MaskedLinear | WeightedLinear:
    """The layer whose mask is that of the kept components, a leaf that asks for gradients."""
    d = student.decompositions[name]
    kept = mask.nonzero().squeeze(-1)
    values = mask[kept].detach().float().to(d.first.device).requires_grad_(True)
    if is_whole(mask):
        return WeightedLinear(student.model.get_submodule(name), d.second, d.first, values)
    at = kept.to(d.first.device)
    centre = None if d.centre is None else d.centre[at]
    bias = add(student.bias(name), d.dropped((mask != 0).float()))
    return MaskedLinear(d.second[:, at], d.first[at], bias, values, centre)
