"""Training the values of the kept masks: no component is added or dropped and no weight is touched, but each kept component
learns how much of itself serves the original model's outputs best. Those of dense matrices too. Folded into the factors, or
into the dense weight, the values cost nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise import distributed
from rankwise.calibration.tokens import Batch, cut, endless, parts_of, sequences_in, written
from rankwise.masks.layers import MaskedLinear, Masks, WeightedLinear, add, is_whole
from rankwise.masks.student import Student, mean_gradients
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
    values = {name: mask[mask != 0].detach().float().to(student.device).requires_grad_(True) for name, mask in given.items()}
    layers = student.layers_of(given, lambda name: _layer(student, name, given[name], values[name]))
    optimiser = torch.optim.Adam(values.values(), lr=options.learning_rate, betas=options.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / options.steps)
    sequences = max(1, options.tokens // written(student.training[0])[0].numel())
    parts = [_own(part) for part in parts_of(student.training, sequences)]
    batches = endless(parts, torch.Generator().manual_seed(student.seed))
    with student.frozen(), student.together():
        bar = progress(range(options.steps), "training mask values")
        for _ in bar:
            own = student.add_gradients(layers, next(batches))
            for name, gradient in mean_gradients(values, own[1]).items():
                values[name].grad = gradient.to(values[name])
            totals, tokens = zip(*distributed.everyones(own), strict=True)
            loss = sum(totals) / sum(tokens)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            if losses is not None:
                losses.append(loss)
            bar.set_postfix(kl=f"{loss:.5f}", refresh=False)
    trained: Masks = {}
    for name, mask in given.items():
        found = values[name].detach().cpu()
        found[found == 0] = torch.finfo(torch.float32).tiny  # a kept component stays one
        trained[name] = mask.float().masked_scatter(mask != 0, found)
    return trained


def _own(batch: Batch) -> list[Batch]:
    """This process's sequences of a batch, as the one batch of a list; none where there are more processes than sequences."""
    rank = distributed.rank()
    return [cut(batch, slice(rank, None, distributed.size()))] if rank < sequences_in(batch) else []


def _layer(student: Student, name: str, mask: Tensor, values: Tensor) -> MaskedLinear | WeightedLinear:
    """The layer of the components that `mask` keeps, weighted with `values`."""
    d = student.decompositions[name]
    second, first = d.second.to(student.device), d.first.to(student.device)
    if is_whole(mask):
        return WeightedLinear(student.model.get_submodule(name), second, first, values)
    at = mask.nonzero().squeeze(-1).to(student.device)
    centre = None if d.centre is None else d.centre[at]
    bias = add(student.bias(name), d.dropped((mask != 0).float()))
    return MaskedLinear(second[:, at], first[at], bias, values, centre)
