"""A measured table of this machine: how long one token takes through each matrix, dense, at a few ranks and in few bits.

A matrix of this table is a `Shape` whose cost is nanoseconds where that of others is parameters: whatever spends a budget of
parameters spends one of time as well.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import RankwiseError
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import Shape
from rankwise.layers.quantised import BYTE, WIDTHS, QuantisedLinear
from rankwise.progress import progress
from rankwise.runtime.bench import decode, prefill
from rankwise.runtime.kernels import KernelLinear
from rankwise.runtime.optimize import arrange
from rankwise.runtime.timing import alternating

POINTS = 6  # ranks measured per shape
COLD = 2**26  # bytes of weights used in turn, more than a cache holds: a whole model does not fit into it either
REPEATS = 40
PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class TimedShape(Shape):
    """A matrix whose cost is the nanoseconds of one token: `dense_time`, or `times` at the rising `ranks`, linear between.

    added: nanoseconds of a low-rank layer beside those of its rank. in_bits: those of the matrix in so many bits, where
    `optimize` has a kernel multiply it.
    """

    dense_time: int
    ranks: tuple[int, ...]
    times: tuple[int, ...]
    in_bits: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_times(
        cls,
        shape: Shape,
        dense_time: int,
        ranks: tuple[int, ...],
        times: tuple[int, ...],
        in_bits: tuple[tuple[int, int], ...] = (),
    ) -> TimedShape:
        """The matrix of that shape."""
        timed: dict[str, Any] = {"dense_time": dense_time, "ranks": ranks, "times": times, "in_bits": in_bits}
        made = cls(shape.out_features, shape.in_features, 0, shape.form, **timed)
        return replace(made, added=max(0, times[0] - ranks[0] * made.per_rank))

    def narrower(self, out_features: int, in_features: int) -> TimedShape:
        """As of `Shape`, every time in proportion to the numbers that are multiplied with."""
        whole, small = (
            Shape(*sides, form=self.form) for sides in ((self.out_features, self.in_features), (out_features, in_features))
        )

        def of(time: int, rank: int | None) -> int:
            return round(time * small.parameters(rank) / whole.parameters(rank))

        times = itertools.accumulate(map(of, self.times, self.ranks), max)
        in_bits = tuple((bits, of(time, None)) for bits, time in self.in_bits)
        return TimedShape.of_times(small, of(self.dense_time, None), self.ranks, tuple(times), in_bits)

    @property
    def dense(self) -> int:
        """Nanoseconds of the dense matrix."""
        return self.dense_time

    @property
    def per_rank(self) -> int:
        """Nanoseconds of one more unit of rank."""
        return max(1, (self.times[-1] - self.times[0]) // max(1, self.ranks[-1] - self.ranks[0]))

    def largest_rank(self, multiple: int = 1) -> int:
        """The largest multiple of `multiple` that is both smaller and faster than dense; 0 where there is none."""
        ranks = np.arange(
            multiple, Shape(self.out_features, self.in_features, form=self.form).largest_rank(multiple) + 1, multiple
        )
        faster = ranks[np.interp(ranks, self.ranks, self.times) < self.dense_time]
        return int(faster.max(initial=0))

    def numbers(self, rank: Any) -> Any:
        """Nanoseconds of that much rank, an integer or a tensor: a straight line near those measured."""
        return rank * self.per_rank

    def rank_of(self, parameters: float) -> float:
        """The rank, seldom whole, of that many nanoseconds on this line."""
        return max(parameters - self.added, 0) / self.per_rank

    def parameters(self, rank: int | None) -> int:
        """Nanoseconds at `rank`; None is dense."""
        return self.dense_time if rank is None else round(float(np.interp(rank, self.ranks, self.times)))

    def time(self, rank: int | None, bits: int | None) -> int:
        """Nanoseconds at `rank` in so many bits, None for the model's own; low rank as fast as in those."""
        return dict(self.in_bits).get(bits or 0, self.dense_time) if rank is None else self.parameters(rank)


@dataclass(frozen=True)
class Latency:
    """What was measured: the matrices by path, and the nanoseconds of one token through the whole dense model."""

    shapes: dict[str, TimedShape]
    step: int

    def costs(self, shapes: Mapping[str, Shape]) -> dict[str, TimedShape]:
        """The matrices as they were timed, those that are narrower now in proportion."""
        return {name: self.shapes[name].narrower(shape.out_features, shape.in_features) for name, shape in shapes.items()}

    def speedup(
        self, ranks: Mapping[str, int | None], shapes: Mapping[str, Shape], bits: Mapping[str, int] | None = None
    ) -> float:
        """The predicted speed-up of decoding one token with these ranks, shapes and bits, all else as it is, after `optimize`."""
        took = {name: cost.time(ranks[name], (bits or {}).get(name)) for name, cost in self.costs(shapes).items()}
        saved = sum(self.shapes[name].dense - time for name, time in took.items())
        return self.step / (self.step - saved)


class Weights:
    """Random matrices cut from one buffer, one after the other: those of a pool share no memory while it lasts."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.buffer, self.at = (0.02 * torch.randn(size // dtype.itemsize)).to(device, dtype), 0

    def matrix(self, rows: int, columns: int) -> Tensor:
        """The next [rows, columns]."""
        if self.at + rows * columns > len(self.buffer):
            self.at = 0
        self.at += rows * columns
        return self.buffer[self.at - rows * columns : self.at].view(rows, columns)

    def layer(self, shape: Shape, rank: int | None) -> nn.Module:
        """A linear layer of the shape, or a low-rank one as `optimize` leaves it."""
        if rank is not None:
            layer = shape.empty(rank, dtype=self.buffer.dtype)
            for factor in (layer.first, layer.second):
                factor.weight = nn.Parameter(self.matrix(*factor.weight.shape), requires_grad=False)
            for name, index in layer.named_buffers():
                layer.register_buffer(name, torch.randperm(len(index), dtype=index.dtype).to(self.buffer.device))
            arrange(layer)
            return layer
        dense = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.matrix(shape.out_features, shape.in_features), requires_grad=False)
        return dense


def decodes(model: Any) -> bool:
    """Whether it is a causal language model, which writes one token after the other."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def time_layers(model: Any, shapes: Mapping[str, Shape], repeats: int = REPEATS) -> Latency:
    """Time the model's matrices and one step of its decoding, all in turn. Raises `RankwiseError` for a model that does not
    decode."""
    if not decodes(model):
        raise RankwiseError(
            f"target_speedup needs a causal language model, not a {type(model).__name__}: give a rate",
        )
    first = weight_of(model.get_submodule(next(iter(shapes))))
    output = prefill(model, torch.zeros(1, PROMPT, dtype=torch.long, device=first.device))
    step = _nanoseconds(alternating([lambda: decode(model, output, 1)], repeats)[0])
    largest = max(shape.dense for shape in shapes.values()) * first.element_size()
    whole = sum(shape.dense for shape in shapes.values()) * first.element_size()
    weights = Weights(max(min(COLD, whole), 2 * largest), first.dtype, first.device)
    times = {shape: _times(weights, shape, first, repeats) for shape in progress(sorted(set(shapes.values()), key=str), "timing")}
    timed = {name: TimedShape.of_times(shape, *times[shape]) for name, shape in shapes.items()}
    return Latency(timed, max(step, sum(shape.dense for shape in timed.values())))


def _times(
    weights: Weights, shape: Shape, like: Tensor, repeats: int
) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Nanoseconds dense; ranks; nanoseconds at these; bits with nanoseconds. Each call is of another copy."""
    ranks = sorted({max(1, int(r)) for r in np.linspace(0, shape.largest_rank(), POINTS)})
    x = torch.randn(1, 1, shape.in_features).to(like)
    tasks = []
    for rank in (None, *ranks):
        copies = max(2, len(weights.buffer) // shape.parameters(rank))
        pool = itertools.cycle([weights.layer(shape, rank) for _ in range(min(copies, repeats))])
        tasks.append(functools.partial(_next, pool, x))
    widths = [bits for bits in WIDTHS if not _in_bits(shape, bits, like).as_dense]
    for bits in widths:
        copies = max(2, weights.buffer.nbytes * BYTE // (shape.parameters(None) * bits))
        pool = itertools.cycle([_in_bits(shape, bits, like) for _ in range(min(copies, repeats))])
        tasks.append(functools.partial(_next, pool, x))
    dense, *low = map(_nanoseconds, alternating(tasks, repeats))
    low, few = low[: len(ranks)], low[len(ranks) :]
    return dense, tuple(ranks), tuple(np.maximum.accumulate(low).tolist()), tuple(zip(widths, few, strict=True))


def _in_bits(shape: Shape, bits: int, like: Tensor) -> KernelLinear:
    layer = QuantisedLinear(shape.in_features, shape.out_features, bits, device=like.device, dtype=like.dtype)
    return KernelLinear.of_layer(layer)


@torch.inference_mode()
def _next(layers: Iterator[nn.Module], x: Tensor) -> None:
    next(layers)(x)


def _nanoseconds(seconds: list[float]) -> int:
    return round(min(seconds) * 1e9)  # what other work on the machine adds is not the machine's
