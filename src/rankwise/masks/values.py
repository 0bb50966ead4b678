"""Training the values of the kept masks: no component is added or dropped and no weight is touched, but each kept component
learns how much of itself serves the original model's outputs best. Those of dense matrices too. Folded into the factors, or
into the dense weight, the values cost nothing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rankwise.masks.descent import Descent, descend, own_parts
from rankwise.masks.layers import MaskedLinear, Masks, WeightedLinear, add, is_whole
from rankwise.masks.student import Student


def train_values(student: Student, masks: Masks, options: Descent, losses: list[float] | None = None) -> Masks:
    """The masks with their non-zero weights, and those of the dense matrices, trained on KL(original || student) over the
    training batches, in an order drawn from the student's seed. The loss of each step, nats per token, is added to `losses`."""
    if not options.steps or all(mask is None for mask in masks.values()):
        return masks
    full = {name: torch.ones(len(d.spectrum)) for name, d in student.decompositions.items()}
    given = full | {name: mask for name, mask in masks.items() if mask is not None}
    values = {name: mask[mask != 0].detach().float().to(student.device).requires_grad_(True) for name, mask in given.items()}
    layers = student.layers_of(given, lambda name: _layer(student, name, given[name], values[name]))
    parts, add_gradients = own_parts(student, options.tokens), functools.partial(student.add_gradients, layers)
    scales = dict.fromkeys(values.values(), 1.0)
    descend(student, parts, add_gradients, scales, options, "training mask values", [] if losses is None else losses)
    trained: Masks = {}
    for name, mask in given.items():
        found = values[name].detach().cpu()
        found[found == 0] = torch.finfo(torch.float32).tiny  # a kept component stays one
        trained[name] = mask.float().masked_scatter(mask != 0, found)
    return trained


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
