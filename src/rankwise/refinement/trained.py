"""What is trained of a layer, in float32, whatever it is written as and computes in: a balanced pair of factors of one of low
rank, the weight of a narrower one, and of one in few bits its scales and, on a grid, where between whole numbers each weight
stands."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.decomposition.rounding import low_rank_in_bits
from rankwise.layers.linear import bias_of, dense_linear, holds_matrix, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.quantised import BYTE, QuantisedLinear, on_trellis, times_steps
from rankwise.layers.trellis import values
from rankwise.masks.student import Layers, Student

WITHIN = 0.499  # of a whole number: rounding leaves it as it is


class Trained(nn.Module):
    """y = W x + bias, of float32 that ask for gradients, computed in the input's dtype."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else _trained(bias)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W [m, n], computed at each read: some models look at their layers' weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def steps(self) -> Iterator[tuple[Tensor, float]]:
        """Each parameter, and how large a step it may take: in proportion to its numbers, and the smaller the more inputs add up,
        as all of them move at once (Yang et al. 2022, arXiv 2203.03466)."""
        return ((p, _size_of(p) / math.sqrt(p.shape[-1])) for p in self.parameters())

    @abstractmethod
    def written_as(self, layer: nn.Module) -> nn.Module:
        """A layer of what is trained, of the class, sizes and dtype of `layer`."""


class TrainedFactors(Trained):
    """W = B A, for B [m, r] and A [r, n].

    B = U sqrt(S) and A = sqrt(S) V^T of the product's singular value decomposition, so that both have the same scale in every
    direction; pivots and coefficients have not, and would be a poor basis to descend in.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__(layer.bias)
        second, first = (factor.detach().float() for factor in layer.factors)
        (left, upper), (right, lower) = torch.linalg.qr(second), torch.linalg.qr(first.T)
        U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        self.second = nn.Parameter(left @ U * S.sqrt())
        self.first = nn.Parameter(S.sqrt()[:, None] * Vh @ right.T)

    @property
    def weight(self) -> Tensor:
        return self.second @ self.first

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(F.linear(x, self.first.to(x.dtype)), self.second.to(x.dtype), bias)

    def written_as(self, layer: nn.Module) -> LowRankLinear:
        assert isinstance(layer, LowRankLinear)
        found = type(layer).from_factors(self.second.detach(), self.first.detach(), _found(self.bias))
        found = found.to(layer.factors[0].dtype)
        return low_rank_in_bits(found, layer.first.bits) if isinstance(layer.first, QuantisedLinear) else found


class TrainedWeight(Trained):
    """W [m, n] itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(bias_of(layer))
        self.numbers = _trained(weight_of(layer))

    @property
    def weight(self) -> Tensor:
        return self.numbers

    def written_as(self, layer: nn.Module) -> nn.Module:
        transposed = isinstance(layer, Conv1D)
        return dense_linear(self.numbers.detach(), _found(self.bias), transposed).to(weight_of(layer).dtype)


class TrainedScales(Trained):
    """W of the values [m, n] of paths through a trellis times `scales` [m, groups]. The paths stay: few of their neighbours are
    better ones, and gradients that are handed on as they are do not find them."""

    numbers: Tensor

    def __init__(self, layer: QuantisedLinear) -> None:
        super().__init__(layer.bias)
        self.scales, self.group = _trained(layer.steps), layer.group
        self.register_buffer("numbers", values(layer.whole_numbers, layer.bits))

    @property
    def weight(self) -> Tensor:
        return times_steps(self.numbers, self.scales, self.group)

    def steps(self) -> Iterator[tuple[Tensor, float]]:
        """As many inputs add up as there are columns, not groups."""
        return ((p, _size_of(p) / math.sqrt(self.numbers.shape[-1])) for p in self.parameters())

    def written_as(self, layer: nn.Module) -> QuantisedLinear:
        assert isinstance(layer, QuantisedLinear)
        steps, bias = self.scales.detach(), _found(self.bias)
        return QuantisedLinear.of(layer.whole_numbers, steps, layer.unit, layer.bits, bias).to(layer.dtype)


class TrainedCodes(Trained):
    """W of the whole numbers nearest to `places` [m, n] times `scales` [m, groups]; rounding hands gradients on as they are
    (EfficientQAT, Chen et al. 2024, arXiv 2407.11062).

    At first every weight stands where the original's does, or as near as its whole number lets it.
    """

    def __init__(self, layer: QuantisedLinear, original: Tensor) -> None:
        super().__init__(layer.bias)
        self.bits, self.group, self.coding, self.unit = layer.bits, layer.group, layer.coding, layer.unit
        self.scales, codes = _trained(layer.steps), layer.whole_numbers.float()
        off = original.detach().float() / times_steps(torch.ones_like(codes), self.scales.detach(), self.group) - codes
        self.places = nn.Parameter(codes + off.nan_to_num().clamp(-WITHIN, WITHIN))

    @property
    def codes(self) -> Tensor:
        """[m, n] float32, whole numbers."""
        most = 2 ** (self.bits - 1)
        return self.places.detach().round().clamp(-most, most - 1)

    @property
    def weight(self) -> Tensor:
        return times_steps(self.places + (self.codes - self.places).detach(), self.scales, self.group)

    def steps(self) -> Iterator[tuple[Tensor, float]]:
        """Places step in proportion to 1, which is from one whole number to the next."""
        sizes = ((p, 1.0 if p is self.places else _size_of(p)) for p in self.parameters())
        return ((p, size / math.sqrt(self.places.shape[-1])) for p, size in sizes)

    def written_as(self, layer: nn.Module) -> QuantisedLinear:
        assert isinstance(layer, QuantisedLinear)
        steps, bias = self.scales.detach(), _found(self.bias)
        return QuantisedLinear.of(self.codes.to(torch.int8), steps, self.unit, self.bits, bias, self.coding).to(layer.dtype)


def _trained(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float().clone())


def _size_of(values: Tensor) -> float:
    return values.detach().square().mean().sqrt().item()


def _found(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach()


def in_training(student: Student, layers: Layers) -> dict[str, Trained]:
    """What is trained of those of the layers that are of low rank, in fewer than 8 bits, or smaller than the original's."""

    def made(name: str, layer: nn.Module) -> Trained | None:
        if isinstance(layer, LowRankLinear):
            return TrainedFactors(layer)
        original = student.originals[name] if name in student.originals else student.model.get_submodule(name)
        if isinstance(layer, QuantisedLinear):
            if on_trellis(layer.bits, layer.coding):
                return TrainedScales(layer)
            return TrainedCodes(layer, weight_of(original)) if layer.bits < BYTE else None
        smaller = holds_matrix(layer) and weight_of(layer).shape != weight_of(original).shape
        return TrainedWeight(layer) if smaller else None

    return {name: found for name, layer in layers.items() if (found := made(name, layer)) is not None}


def scales_of(trained: Mapping[str, Trained], paces: Mapping[type[Trained], float] | None = None) -> dict[Tensor, float]:
    """The `steps` of all of them; paces: what those of a class are multiplied by."""
    steps = [((paces or {}).get(type(layer), 1.0), layer.steps()) for layer in trained.values()]
    return {parameter: pace * step for pace, own in steps for parameter, step in own}


def written(trained: Mapping[str, Trained], layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers with what was trained in place of theirs, in their own class, rank and dtype."""
    return {name: trained[name].written_as(layer) if name in trained else layer for name, layer in layers.items()}
