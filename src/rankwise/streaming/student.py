"""The student of a model whose blocks are loaded in turn."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.allocation.problem import Allocation
from rankwise.calibration.signal import as_signal, divergence
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.solver import Decomposition
from rankwise.evaluation.compare import Comparison, compare
from rankwise.layers.linear import swapped
from rankwise.masks.layers import Masks, factorised
from rankwise.masks.student import Student
from rankwise.progress import progress
from rankwise.streaming.activations import Activations
from rankwise.streaming.decomposition import Stored
from rankwise.streaming.stream import Stream


@dataclass
class StreamedStudent(Student):
    """A student that runs forward only, block by block.

    It keeps the original's hidden states before every block, so that a measurement starts at the first block with a mask.
    """

    stream: Stream = field(kw_only=True)
    _dense: dict[tuple[int, ...], list[Activations]] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The weight [m, n] of a matrix, read from disk."""
        with self.stream.blocks.loaded([f"{name}.weight"]):
            return super().weight(name)

    def layers(self, index: int, masks: Masks) -> dict[str, nn.Module]:
        """The low-rank layers of a loaded block under `masks`."""
        layers: dict[str, nn.Module] = {}
        for name in self.stream.matrices_of(index):
            mask = masks.get(name)
            if mask is not None:
                layers[name] = factorised(self.decompositions[name], mask, self.bias(name)).to(self.stream.blocks.device)
        return layers

    @torch.no_grad()
    def divergence(self, masks: Masks, batches: Sequence[Batch] | None = None) -> float:
        """As of `Student`; the sum is taken window by window."""
        batches = self.selection if batches is None else batches
        stream, blocks = self.stream, self.stream.blocks
        with stream.opened():
            dense = self._dense_states(batches)
            touched = [i for i in range(len(blocks)) if any(masks.get(name) is not None for name in stream.matrices_of(i))]
            first = min(touched, default=len(blocks))
            small = Activations("student", stream.room)
            for number in range(len(batches)):
                small[number] = dense[first][number]
            for index in range(first, len(blocks)):
                with blocks.loaded(blocks.names(index)), swapped(self.model, self.layers(index, masks)):
                    stream.advance(index, small, batches)
            total, tokens = 0.0, 0
            with blocks.loaded(blocks.outside()["head"]):
                for piece, number, i in windows(batches):
                    reference, other = (
                        as_signal(*blocks.leave(piece, hidden[number][i : i + 1]), piece) for hidden in (dense[-1], small)
                    )
                    total += divergence(reference, other).item()
                    self.count(other)
                    tokens += len(reference.values)
            small.clear()
        return total / tokens

    def forget(self) -> None:
        """Give back what the hidden states take."""
        for states in self._dense.values():
            for hidden in states:
                hidden.clear()
        self._dense.clear()

    def _dense_states(self, batches: Sequence[Batch]) -> list[Activations]:
        """The original's hidden states before every block and after the last."""
        key = tuple(map(id, batches))
        if key not in self._dense:
            stream = self.stream
            states = [stream.entered(f"dense-{len(self._dense)}-0", batches)]
            for index in progress(range(len(stream.blocks)), "running the original"):
                states.append(Activations(f"dense-{len(self._dense)}-{index + 1}", stream.room))
                with stream.blocks.loaded(stream.blocks.names(index)):
                    for number, batch in enumerate(batches):
                        call = stream.blocks.call_of(index, batch)
                        states[-1][number] = stream.blocks.run(index, states[-2][number], call)
            self._dense[key] = states
        return self._dense[key]


def windows(batches: Sequence[Batch]) -> list[tuple[Batch, int, int]]:
    """Every single sequence as a batch of its own, with its batch's number and its place there."""
    return [
        ({name: tensor[i : i + 1] for name, tensor in batch.items()}, number, i)
        for number, batch in enumerate(batches)
        for i in range(len(next(iter(batch.values()))))
    ]


def student_of(stream: Stream, decompositions: Mapping[str, Stored]) -> StreamedStudent:
    """The student for allocators that need no backward pass."""
    kept: Mapping[str, Decomposition] = decompositions  # type: ignore[assignment]  # the same three tensors
    run = stream.run
    return StreamedStudent(run.model, kept, run.data.training, run.data.selection, run.seed, stream=stream)


def measure(stream: Stream, student: StreamedStudent, chosen: Allocation) -> Comparison:
    """As `stages.measure`: both models over the measuring text, each block loaded once, the head window by window."""
    student.forget()
    batches, blocks = stream.run.data.measuring, stream.blocks
    with stream.opened():
        dense, small = (stream.entered(name, batches) for name in ("original", "compressed"))
        for index in progress(range(len(blocks)), "measuring blocks"):
            with blocks.loaded(blocks.names(index)):
                stream.advance(index, dense, batches)
                with swapped(stream.run.model, student.layers(index, chosen.masks)):
                    stream.advance(index, small, batches)
        pieces = windows(batches)
        place = {id(piece): (number, i) for piece, number, i in pieces}

        def values(hidden: Activations, piece: Batch) -> tuple[Tensor, bool]:
            number, i = place[id(piece)]
            return blocks.leave(piece, hidden[number][i : i + 1])

        with blocks.loaded(blocks.outside()["head"]):
            original, compressed = (functools.partial(values, hidden) for hidden in (dense, small))
            comparison = compare(original, compressed, [piece for piece, _, _ in pieces], stream.run.model.can_generate())
        dense.clear()
        small.clear()
    return comparison
