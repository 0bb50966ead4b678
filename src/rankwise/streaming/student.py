"""The student of a model whose blocks are loaded in turn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise import distributed
from rankwise.allocation.problem import Allocation
from rankwise.calibration.signal import Signal, divergence
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.solver import Decomposition
from rankwise.evaluation.compare import Comparison, compare
from rankwise.layers.linear import swapped, weight_of
from rankwise.layers.lowrank import PairLinear
from rankwise.masks.layers import Masks, folded
from rankwise.masks.student import Layers, Student
from rankwise.progress import progress
from rankwise.stages import kept_in
from rankwise.streaming.activations import Activations
from rankwise.streaming.backward import backward, forward, pieces_of, sequences_of
from rankwise.streaming.decomposition import Stored
from rankwise.streaming.stream import Stream


@dataclass
class StreamedStudent(Student):
    """A student that runs block by block.

    It keeps the original's hidden states before every block, so that a measurement starts at the first block with a mask, and
    of text that masks are trained on those after the last.
    """

    stream: Stream = field(kw_only=True)
    _dense: dict[tuple[int, ...], tuple[Sequence[Batch], list[Activations]]] = field(default_factory=dict)
    _last: dict[tuple[int, ...], tuple[Sequence[Batch], list[Batch], Activations]] = field(default_factory=dict)
    _read: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The weight [m, n] of a matrix, read from disk with those that are made together with it, and kept until the next."""
        if name in self.stream.blocks.narrower:
            with self.stream.blocks.loaded([f"{name}.weight"]):
                return weight_of(self.model.get_submodule(name))
        source, stored = self.stream.blocks.source, f"{name}.weight"
        if stored not in self._read:
            self._read.clear()  # before the next is there
            self._read |= dict(source.values(source.beside(stored)))
        weight = self._read[stored].to(self.device)
        return weight.T if isinstance(self.model.get_submodule(name), Conv1D) else weight

    def exactly(self) -> AbstractContextManager[None]:
        """As it is: what blocks compute in is settled before the first is loaded, on a GPU what they are stored in."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        return self.stream.blocks.device

    def layers_of(self, names: Iterable[str], make: Callable[[str], nn.Module]) -> Layers:
        """The layers, each made anew when it is asked for: its block is loaded then."""
        return _Made(list(names), make)

    def low_rank(self, index: int, masks: Masks, form: str = PairLinear.form) -> dict[str, nn.Module]:
        """The layers of a loaded block that are shipped, and under `masks` those of the other matrices."""
        layers = {}
        for name in self.stream.matrices_of(index):
            linear, mask = self.model.get_submodule(name), masks.get(name)
            if name in self.shipped:
                layers[name] = self.shipped[name].to(self.device, weight_of(linear).dtype)
            elif mask is not None:
                layers[name] = folded(linear, self.decompositions[name], mask, form).to(self.device)
        return layers

    def cost(self, layers: Layers, batches: Sequence[Batch] | None = None) -> float:
        """As of `Student`."""
        with self.together():
            return replace(self, shipped=layers)._divergence({}, self.selection if batches is None else batches)

    def differentiate(self, layers: Layers, batches: Iterable[Batch], loss: Callable[[Batch, Signal], Tensor]) -> None:
        """As of `Student`, window by window at the head."""

        def counted(window: Batch, signal: Signal) -> Tensor:
            self.count(signal, backward=True)
            return loss(window, signal)

        def around(index: int) -> AbstractContextManager[None]:
            own = [name for name in self.stream.matrices_of(index) if name in layers]
            return swapped(self.model, {name: layers[name] for name in own})

        pieces = pieces_of(batches)
        if not pieces:
            return
        with self.stream.opened():
            backward(self.stream, forward(self.stream, "student", pieces, around), pieces, counted, around)

    def add_gradients(self, layers: Layers, batches: Iterable[Batch]) -> tuple[float, int]:
        """As of `Student`; what the original says is found from its last hidden states."""
        pieces, last = self._original(list(batches))
        places = iter(sequences_of(pieces))

        @torch.no_grad()
        def original(window: Batch) -> Signal:
            _, number, i = next(places)
            return self.stream.blocks.leave(window, self.stream.blocks.sequence(last[number], i))

        return self._add_gradients(layers, pieces, original)

    @torch.no_grad()
    def _divergence(self, masks: Masks, batches: Sequence[Batch]) -> float:
        """The sum is taken window by window."""
        stream, blocks, batches = self.stream, self.stream.blocks, distributed.dealt(batches)
        with stream.opened():
            dense = self._dense_states(batches)
            changed = {*self.originals, *self.shipped, *(name for name, mask in masks.items() if mask is not None)}
            first = min((i for i in range(len(blocks)) if changed & {*stream.matrices_of(i)}), default=len(blocks))
            small = Activations("student", stream.room)
            for number in range(len(batches)):
                small[number] = dense[first][number]
            for index in range(first, len(blocks)):
                with blocks.loaded(blocks.names(index)), swapped(self.model, self.low_rank(index, masks)):
                    stream.advance(index, small, batches)
            parts = [[0.0, 0] for _ in batches]
            with blocks.loaded(blocks.outside()["head"]):
                for piece, number, i in sequences_of(batches):
                    reference, other = (blocks.leave(piece, blocks.sequence(hidden[number], i)) for hidden in (dense[-1], small))
                    parts[number][0] += divergence(reference, other).item()
                    parts[number][1] += len(reference)
                    self.count(other)
            small.clear()
        totals, tokens = zip(*distributed.collected(parts), strict=True)
        return sum(totals) / sum(tokens)

    def _taught_anew(self) -> Self:
        return replace(self, originals={}, _signals={}, _dense={}, _last={})

    def forget(self) -> None:
        """Give back what hidden states and weights take."""
        for hidden in (*(h for _, states in self._dense.values() for h in states), *(last for *_, last in self._last.values())):
            hidden.clear()
        self._dense.clear()
        self._last.clear()
        self._read.clear()
        if self._as_it_is is not self:
            self._as_it_is.forget()

    def _dense_states(self, batches: Sequence[Batch]) -> list[Activations]:
        """The original's hidden states before every block and after the last. Needs `stream.opened`."""
        key = tuple(map(id, batches))
        if key not in self._dense:
            with self.as_original():
                self._dense[key] = batches, forward(self.stream, f"dense-{next(_numbers)}", batches)
        return self._dense[key][1]

    def _original(self, batches: Sequence[Batch]) -> tuple[list[Batch], Activations]:
        """The batches in pieces, and the original's hidden states after its last block."""
        key, stream = tuple(map(id, batches)), self.stream
        if key not in self._last:
            pieces = pieces_of(batches)
            with stream.opened(), self.as_original():
                hidden = stream.entered(f"original-{next(_numbers)}", pieces)
                for index in range(len(stream.blocks)):
                    with stream.blocks.loaded(stream.blocks.names(index)):
                        stream.advance(index, hidden, pieces)
            self._last[key] = batches, pieces, hidden
        return self._last[key][1:]


_numbers = itertools.count()  # of hidden states, which are named after them


class _Made(Mapping[str, nn.Module]):
    """Layers by name, made at each access."""

    def __init__(self, names: Sequence[str], make: Callable[[str], nn.Module]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> nn.Module:
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def student_of(stream: Stream, decompositions: Mapping[str, Stored], metric: str) -> StreamedStudent:
    """As `stages.student_of`."""
    stored: Mapping[str, Decomposition] = decompositions  # type: ignore[assignment]  # the same tensors
    run = stream.run
    kept = kept_in(run, metric)
    return StreamedStudent(run.model, stored, run.data.training, run.data.selection, run.seed, kept=kept, stream=stream)


def measure(stream: Stream, student: StreamedStudent, chosen: Allocation) -> Comparison:
    """As `stages.measure`: both models over the measuring text, each block loaded once, the head window by window."""
    student.forget()
    batches, blocks = stream.run.data.measuring, stream.blocks
    with stream.opened():
        dense, small = (stream.entered(name, batches) for name in ("original", "compressed"))
        for index in progress(range(len(blocks)), "measuring blocks"):
            with blocks.loaded(blocks.names(index)):
                with student.as_original():
                    stream.advance(index, dense, batches)
                with swapped(stream.run.model, student.low_rank(index, chosen.masks)):
                    stream.advance(index, small, batches)
        pieces = sequences_of(batches)
        place = {id(piece): (number, i) for piece, number, i in pieces}

        def values(hidden: Activations, piece: Batch) -> Signal:
            number, i = place[id(piece)]
            return blocks.leave(piece, blocks.sequence(hidden[number], i))

        with blocks.loaded(blocks.outside()["head"]):
            original, compressed = (functools.partial(values, hidden) for hidden in (dense, small))
            comparison = compare(original, compressed, [piece for piece, _, _ in pieces], stream.run.model.can_generate())
        dense.clear()
        small.clear()
    return comparison
