"""Training the values of the kept masks: no component is added or dropped and no weight is touched, but each kept component
learns how much of itself serves the original model's outputs best. Those of dense matrices too. Folded into the factors, or
into the dense weight, the values cost nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.calibration.signal import Signal, divergence, signal_of
from rankwise.calibration.tokens import endless
from rankwise.layers.linear import swapped
from rankwise.masks.student import TEACHER_BYTES, MaskedLinear, Masks, Student, WeightedLinear, add, is_whole
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
    known: dict[int, Signal] = {}  # what the original says to a part, of which there are not many
    room = TEACHER_BYTES
    with student.frozen():
        bar = progress(range(options.steps), "training mask values")
        for _ in bar:
            batch = next(batches)
            reference = known.get(id(batch)) or student.teacher(batch)
            if id(batch) not in known and reference.values.nbytes <= room:
                known[id(batch)] = reference
                room -= reference.values.nbytes
            with swapped(student.model, layers):
                loss = divergence(reference, signal_of(student.model, batch)) / len(reference.values)
                loss.backward()
            student.count(reference, backward=True)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            if losses is not None:
                losses.append(loss.item())
            bar.set_postfix(kl=f"{loss.item():.5f}", refresh=False)
    trained: Masks = {}
    for name, mask in given.items():
        values = layers[name].mask.detach().float().cpu()
        values[values == 0] = torch.finfo(torch.float32).tiny  # a kept component stays one
        trained[name] = mask.float().masked_scatter(mask != 0, values)
    return trained


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
