"""Faster inference from the same factors. Nothing is approximated; memory and checkpoint stay what they are.

1. Factors that read the same input (q, k, v; gate, up) are multiplied at once: fewer and larger products. Which ones do is seen
   in one call of the model, so that no architecture has to be known.
2. On a CPU in float32 second factors are stored column by column: their rows are short (one number per component), and BLAS
   reads many short rows at two thirds of the speed of memory.
3. Layers of few bits are multiplied by torch's kernels (`kernels.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.calibration.batches import made_up
from rankwise.calibration.moments import find_sites
from rankwise.calibration.signal import call, frozen
from rankwise.errors import reason
from rankwise.layers.lowrank import LowRankLinear
from rankwise.runtime.kernels import with_kernels

logger = logging.getLogger(__name__)


class Joint:
    """The first factors of siblings as one weight [sum of ranks, in_features], of which theirs are views."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.ranks = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.pending: tuple[Tensor | None, dict[int, Tensor]] = (None, {})  # an input, and the products not yet fetched

    def product(self, x: Tensor, index: int) -> Tensor:
        """The product [..., rank] of `x` [..., in_features] with the factor of the sibling `index`.

        The first sibling that is called with `x` computes all of them; the others find theirs.
        """
        known, products = self.pending  # read once: another thread may be at work with an input of its own
        if known is not x or index not in products:
            products = dict(enumerate(F.linear(x, self.weight).split(self.ranks, -1)))
            self.pending = (x, products)
        product = products.pop(index)
        if not products:
            self.pending = (None, {})
        return product


class JointLinear(nn.Linear):
    """A first factor whose product is computed together with its siblings'."""

    joint: Joint
    index: int

    @classmethod
    def of(cls, layer: nn.Linear, joint: Joint, index: int) -> JointLinear:
        """The factor `layer` as the part `index` of `joint`, its weight a view."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(joint.weight.split(joint.ranks)[index], requires_grad=False)
        made.joint, made.index = joint, index
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., rank]."""
        if self.weight.requires_grad:  # somebody trains it after all
            return super().forward(x)
        return self.joint.product(x, self.index)


def optimize(model: Any) -> Any:
    """Rearrange the layers of a compressed model for inference, in place, and return the model.

    Do it last, on the device and in the dtype that it will run with: weights moved or cast afterwards stop with an error. A
    model that is optimized already stays as it is. Saving it writes the same folder as before.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    reading = {name: layer for name, layer in layers.items() if layer.first.in_features == layer.in_features}  # all of the input
    for siblings in _siblings(model, {name: layer for name, layer in reading.items() if type(layer.first) is nn.Linear}):
        joint = Joint([layer.first for layer in siblings])
        for index, layer in enumerate(siblings):
            layer.first = JointLinear.of(layer.first, joint, index)
    for layer in layers.values():
        arrange(layer)
    with_kernels(model)
    return model


def arrange(layer: LowRankLinear) -> None:
    """Store the second factor column by column where that is read faster."""
    weight = layer.second.weight
    if type(layer.second) is nn.Linear and weight.device.type == "cpu" and weight.dtype == torch.float32:
        weight.data = weight.data.T.contiguous().T


def _siblings(model: Any, layers: dict[str, LowRankLinear]) -> list[list[LowRankLinear]]:
    """The layers that are handed the very same tensor, on the same device and in the same dtype, where they are several; none,
    with a warning, for a model that does not run on made-up inputs."""
    if not layers:
        return []
    try:
        with frozen(model), torch.no_grad():
            site_of = find_sites(model, layers, lambda: call(model, made_up(model)))
    except Exception as error:  # as many ways as there are inputs
        name = type(model).__name__
        logger.warning("factors stay apart that may read the same input: no call of %s is known: %s", name, reason(error))
        return []
    groups: dict[tuple[Any, ...], list[LowRankLinear]] = {}
    for name, layer in layers.items():
        weight = layer.first.weight
        groups.setdefault((site_of[name], weight.device, weight.dtype), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]
