"""Rounding a matrix to few bits: GPTQ (Frantar et al. 2023, arXiv 2210.17323) in the second moment of its inputs.

Legend: W [m, n] the weight, H [n, n] the damped second moment, U the upper triangular factor of H^-1 = U^T U.

Columns are rounded from the first to the last. What the rounding of column j leaves, e = (w_j - q_j) / U_jj, is made up for by
those after it, W[:, j+1:] -= e U[j, j+1:], with the least error in the norm of H that they allow. A scale is chosen when its
group is reached: of a few sizes that with the least error, columns weighted by their own second moments. Its sign gives the
largest weight of the group the code -2^(bits-1): of negative codes there is one more than of positive ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.calibration.moments import Moments
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import Metric
from rankwise.decomposition.solver import Root
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.quantised import BYTE, GROUP, QuantisedEmbedding, QuantisedLinear, dequantised, group_of, in_bits

DAMPING = 1e-2  # added to the second moment, relative to its mean diagonal: errors are made up for with few bits too
SIZES = torch.linspace(1.0, 0.55, 16)  # of a scale, relative to that which clips nothing
TINY = 1e-30  # the scale of a group of zeros


@dataclass(frozen=True)
class Rounding:
    """Whole numbers [m, n] int8 and scales [m, groups] of a weight in `bits` bits."""

    codes: Tensor
    scales: Tensor
    bits: int

    def layer(self, bias: Tensor | None) -> QuantisedLinear:
        """The layer of these."""
        return QuantisedLinear.of(self.codes, self.scales, self.bits, bias)

    def squared_error(self, W: Tensor, left: Root | None, right: Root | None) -> float:
        """||L^T (W - W') R||^2 in the metric of the roots, for W [m, n]: in float32, as it is a sum of squares, of which
        nothing is taken away."""
        E = (W.detach() - dequantised(self.codes, self.scales, self.bits)).float()
        E = E if left is None else left.apply(E)
        E = E if right is None else right.apply(E.T)
        return float(E.double().square().sum())


def roundings(W: Tensor, widths: Sequence[int], metric: Metric, moments: Moments) -> dict[int, tuple[Rounding, float]]:
    """Bits -> W [m, n] in so many, and its squared error in the metric: in fewer than 8 by GPTQ, which needs the second moment of
    the inputs, in 8 every weight by itself."""
    roots, few = metric.roots(moments), [bits for bits in widths if bits < BYTE]
    found = Compensation.of(input_root(moments)).rounded(W, few) if few else {}
    found |= {bits: nearest(W, bits) for bits in widths if bits == BYTE}
    return {bits: (found[bits], found[bits].squared_error(W, *roots)) for bits in widths}


def nearest(W: Tensor, bits: int) -> Rounding:
    """Every weight of W [m, n] by itself."""
    weight, most = W.detach().float(), torch.tensor(2.0 ** (bits - 1), device=W.device)
    codes, scales = [], []
    for part in weight.split(group_of(bits, weight.shape[1]), 1):
        scale = _unclipped(part.T, most) if bits == BYTE else _scale(part.T, most, torch.ones_like(part[0]))
        scales.append(scale.to(W.dtype))
        codes.append(_code(part, scales[-1].float()[:, None], most))
    return Rounding(torch.cat(codes, 1).to(torch.int8), torch.stack(scales, 1), bits)


def tables_in_bits(tables: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The tables of a vocabulary (path -> module) in 8 bits; those that share a weight share what is made of it."""
    made: dict[int, Rounding] = {}
    layers: dict[str, nn.Module] = {}
    for name, module in tables.items():
        weight = weight_of(module)
        rounding = made.setdefault(id(module.weight), nearest(weight, BYTE))
        embeds = isinstance(module, nn.Embedding)
        layers[name] = QuantisedEmbedding.of(rounding.codes, rounding.scales) if embeds else rounding.layer(bias_of(module))
    return layers


def low_rank_in_bits(layer: LowRankLinear, bits: int) -> LowRankLinear:
    """The layer with both factors in `bits` bits, every number rounded by itself."""

    def write(linear: nn.Linear) -> QuantisedLinear:
        return nearest(linear.weight, bits).layer(linear.bias)

    in_bits(layer, write)
    return layer


@dataclass(frozen=True)
class Compensation:
    """What GPTQ knows of the inputs: U [n, n] and the diagonal of H [n], float32."""

    U: Tensor
    importance: Tensor

    @classmethod
    def of(cls, inputs: Root) -> Compensation:
        """From the root of H [n, n], damped as that of few tokens, and DAMPING above that."""
        assert inputs.full is not None
        damped = inputs.full / inputs.count
        damped.diagonal().add_(inputs.scale.square() + DAMPING * damped.diagonal().mean())
        return cls(_inverse_factor(damped).float(), damped.diagonal().float())

    def rounded(self, W: Tensor, widths: Sequence[int]) -> dict[int, Rounding]:
        """W [m, n] by GPTQ in so many bits each, all below 8 and in one pass: outputs do not depend on each other."""
        U, importance = self.U.to(W.device), self.importance.to(W.device)
        rows = W.detach().float().T.repeat(1, len(widths))  # [n, widths * m]
        most = torch.tensor([2.0 ** (bits - 1) for bits in widths], device=W.device).repeat_interleave(len(W))
        codes, scales = torch.empty_like(rows, dtype=torch.int8), []
        for begin in range(0, len(rows), GROUP):
            inside = slice(begin, begin + GROUP)
            block, within = rows[inside], U[inside, inside]
            scale = _scale(block, most, importance[inside]).to(W.dtype)
            wide, errors = scale.float(), torch.empty_like(block)
            for j, row in enumerate(block):
                code = _code(row, wide, most)
                codes[begin + j] = code
                errors[j] = (row - code * wide) / within[j, j]
                block[j + 1 :].addcmul_(within[j, j + 1 :, None], errors[j], value=-1)
            rows[begin + GROUP :].addmm_(U[inside, begin + GROUP :].T, errors, alpha=-1)
            scales.append(scale)
        parts = zip(codes.T.split(len(W)), torch.stack(scales, 1).split(len(W)), widths, strict=True)
        return {bits: Rounding(own.contiguous(), of_own.contiguous(), bits) for own, of_own, bits in parts}


def _code(weight: Tensor, scale: Tensor, most: Tensor) -> Tensor:
    """The whole numbers nearest to weight / scale, from -most to most - 1."""
    return torch.clamp((weight / scale).round_(), -most, most - 1)


def _unclipped(block: Tensor, most: Tensor) -> Tensor:
    """The scale [m] of the columns [columns, m] of a group that gives the largest weight the code -`most` [m]."""
    scale = block.gather(0, block.abs().argmax(0, keepdim=True))[0] / -most
    return torch.where(scale.abs() < TINY, TINY, scale)


def _scale(block: Tensor, most: Tensor, importance: Tensor) -> Tensor:
    """The scale [m] with the least error of the columns [columns, m] of a group, of some that clip more or less."""
    sizes = _unclipped(block, most) * SIZES.to(block)[:, None]
    errors = [importance @ (_code(block, size, most) * size - block).square() for size in sizes]
    return sizes.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def _inverse_factor(H: Tensor) -> Tensor:
    """U upper triangular, U^T U = H^-1, in H's dtype."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if failed:  # rounding left it indefinite
        values, basis = torch.linalg.eigh(H)
        H = (basis * values.clamp_min(values.max() * torch.finfo(H.dtype).eps * len(H))) @ basis.T
        factor = torch.linalg.cholesky(H)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
