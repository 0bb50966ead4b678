"""Rounding a matrix to few bits: by GPTQ on both sides (`rankwise.decomposition.compensation`), or each number by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.calibration.moments import Moments
from rankwise.decomposition.compensation import Compensation
from rankwise.decomposition.grid import best_scale, unclipped_scale, unit_of, whole_numbers
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import Metric
from rankwise.decomposition.solver import Root
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.quantised import BYTE, GROUP, QuantisedEmbedding, QuantisedLinear, dequantised, in_bits


@dataclass(frozen=True)
class Rounding:
    """Whole numbers [m, n] int8 and steps [m, groups] of a weight in `bits` bits, and the unit [1] of these; None in 8."""

    codes: Tensor
    steps: Tensor
    unit: Tensor | None
    bits: int

    def layer(self, bias: Tensor | None) -> QuantisedLinear:
        """The layer of these."""
        return QuantisedLinear.of(self.codes, self.steps, self.unit, self.bits, bias)

    def squared_error(self, W: Tensor, left: Root | None, right: Root | None) -> float:
        """||L^T (W - W') R||^2 in the metric of the roots, for W [m, n]: in float32, as it is a sum of squares, of which
        nothing is taken away."""
        E = (W.detach() - dequantised(self.codes, self.steps, self.codes.shape[1] if self.unit is None else GROUP)).float()
        E = E if left is None else left.apply(E)
        E = E if right is None else right.apply(E.T)
        return float(E.double().square().sum())


def roundings(W: Tensor, widths: Sequence[int], metric: Metric, moments: Moments) -> dict[int, tuple[Rounding, float]]:
    """Bits -> W [m, n] in so many, and its squared error in the metric: in fewer than 8 by GPTQ, which needs the second moment of
    the inputs, in 8 every weight by itself."""
    roots, few = metric.roots(moments), [bits for bits in widths if bits < BYTE]
    found = {bits: nearest(W, bits) for bits in widths if bits == BYTE}
    if few:
        compensation = Compensation(input_root(moments), roots[0], W)
        found |= {bits: Rounding(*compensation.rounded(W, bits), bits) for bits in few}
    return {bits: (found[bits], found[bits].squared_error(W, *roots)) for bits in widths}


def nearest(W: Tensor, bits: int) -> Rounding:
    """Every weight of W [m, n] by itself."""
    weight, most, unit = W.detach().float(), 2.0 ** (bits - 1), None
    parts = weight.split(weight.shape[1] if bits == BYTE else GROUP, 1)
    if bits == BYTE:
        steps = unclipped_scale(weight.T, most)[:, None].to(W.dtype)
        steps = torch.where(steps == 0, torch.finfo(W.dtype).tiny, steps)
    else:
        unit = unit_of(W.detach(), most)
        steps = torch.stack([best_scale(part.T, most, torch.ones_like(part[0]), unit) for part in parts], 1).to(W.dtype)
    codes = [whole_numbers(part / step[:, None], most) for part, step in zip(parts, steps.float().T, strict=True)]
    return Rounding(torch.cat(codes, 1).to(torch.int8), steps, unit, bits)


def tables_in_bits(tables: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The tables of a vocabulary (path -> module) in 8 bits; those that share a weight share what is made of it."""
    made: dict[int, Rounding] = {}
    layers: dict[str, nn.Module] = {}
    for name, module in tables.items():
        weight = weight_of(module)
        rounding = made.setdefault(id(module.weight), nearest(weight, BYTE))
        embeds = isinstance(module, nn.Embedding)
        layers[name] = QuantisedEmbedding.of(rounding.codes, rounding.steps) if embeds else rounding.layer(bias_of(module))
    return layers


def low_rank_in_bits(layer: LowRankLinear, bits: int) -> LowRankLinear:
    """The layer with both factors in `bits` bits, every number rounded by itself."""

    def write(linear: nn.Linear) -> QuantisedLinear:
        return nearest(linear.weight, bits).layer(linear.bias)

    in_bits(layer, write)
    return layer
