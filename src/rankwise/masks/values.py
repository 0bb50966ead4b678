"""Training the values of the kept masks: no component is added or dropped and no weight is touched, but each kept component
learns how much of itself serves the original model's outputs best. Folded into the factors the values cost nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwise.calibration.signal import divergence, signal_of
from rankwise.layers.linear import swapped
from rankwise.masks.student import MaskedLinear, Masks, Student
from rankwise.progress import progress


@dataclass(frozen=True)
class ValueTraining:
    """Adam on the mask values, its learning rate falling linearly to zero."""

    steps: int = 60
    learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)


def train_values(student: Student, masks: Masks, options: ValueTraining, losses: list[float] | None = None) -> Masks:
    """The masks with their non-zero weights trained on KL(original || student) over the training batches, one batch a step
    in an order drawn from the student's seed. The loss of each step, nats per token, is added to `losses`."""
    kept = {name: mask.nonzero().squeeze(-1) for name, mask in masks.items() if mask is not None}
    if not kept or not options.steps:
        return masks
    layers = {}
    for name, index in kept.items():
        d, mask = student.decompositions[name], masks[name]
        assert mask is not None
        at = index.to(d.first.device)
        values = mask[index].float().to(d.first.device).requires_grad_(True)
        layers[name] = MaskedLinear(d.second[:, at], d.first[at], student.bias(name), values)
    optimiser = torch.optim.Adam([layer.mask for layer in layers.values()], lr=options.learning_rate, betas=options.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / options.steps)
    generator = torch.Generator().manual_seed(student.seed)
    order: list[int] = []
    with student.frozen():
        bar = progress(range(options.steps), "training mask values")
        for _ in bar:
            order = order or torch.randperm(len(student.training), generator=generator).tolist()
            batch = student.training[order.pop()]
            reference = student.teacher(batch)
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
    trained: Masks = dict(masks)
    for name, index in kept.items():
        mask = torch.zeros(len(student.decompositions[name].spectrum))
        mask[index] = layers[name].mask.detach().float().cpu()
        trained[name] = mask
    return trained
