"""Rounding a matrix to few bits: by GPTQ on both sides (`rankwise.decomposition.compensation`), or each group by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.calibration.moments import Moments
from rankwise.decomposition.compensation import Alphabet, Compensation
from rankwise.decomposition.grid import Grid, unclipped_scale, unit_of, whole_numbers
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import Metric
from rankwise.decomposition.solver import Root
from rankwise.decomposition.trellis import Trellis
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.quantised import BYTE, QuantisedEmbedding, QuantisedLinear, dequantised, in_bits, on_trellis


@dataclass(frozen=True)
class Rounding:
    """Codes [m, n] int8 and steps [m, groups] of a weight in `bits` bits, and the unit [1] of these; None in 8."""

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
        E = (W.detach() - dequantised(self.codes, self.steps, self.bits)).float()
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
        for bits in few:
            alphabet = alphabet_of(W, bits)
            found[bits] = Rounding(*compensation.rounded(W, alphabet), alphabet.unit, bits)
    return {bits: (found[bits], found[bits].squared_error(W, *roots)) for bits in widths}


def alphabet_of(W: Tensor, bits: int) -> Alphabet:
    """What groups of W [m, n] may become in fewer than 8 bits."""
    unit = unit_of(W.detach(), 2.0 ** (bits - 1))
    return Trellis(bits, unit) if on_trellis(bits) else Grid(bits, unit)


def nearest(W: Tensor, bits: int) -> Rounding:
    """Every group of W [m, n] by itself, and every weight on a grid."""
    if bits == BYTE:
        weight = W.detach().float()
        steps = unclipped_scale(weight.T, 2.0 ** (BYTE - 1))[:, None].to(W.dtype)
        steps = torch.where(steps == 0, torch.finfo(W.dtype).tiny, steps)
        return Rounding(whole_numbers(weight / steps.float(), 2.0 ** (BYTE - 1)).to(torch.int8), steps, None, bits)
    alphabet = alphabet_of(W, bits)
    return Rounding(*each_group(W, alphabet), alphabet.unit, bits)


def each_group(W: Tensor, alphabet: Alphabet) -> tuple[Tensor, Tensor]:
    """Codes [m, n] int8 and scales [m, groups], in W's dtype, of W [m, n]: as of `Compensation.rounded`, but no group makes up
    for another."""
    parts = [part.T for part in W.detach().float().split(alphabet.group, 1)]
    found = [alphabet.first(part, torch.ones_like(part[:, 0]), torch.eye(len(part)).to(part)) for part in parts]
    codes = torch.cat([codes for codes, _ in found]).T.to(torch.int8)
    return codes, torch.stack([scale for _, scale in found], 1).to(W.dtype)


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
