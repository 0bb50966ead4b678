"""Gradients of a model whose blocks are loaded in turn: its hidden states are kept before every block, and a block is run once
more when the gradient comes back to it (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rankwise.calibration.signal import Signal
from rankwise.calibration.tokens import Batch, parts_of
from rankwise.progress import progress
from rankwise.streaming.activations import Activations
from rankwise.streaming.memory import sequences_at_once
from rankwise.streaming.stream import Stream

Around = Callable[[int], AbstractContextManager[Any]]
Loss = Callable[[Batch, Signal], Tensor]


def pieces_of(batches: Iterable[Batch]) -> list[Batch]:
    """The batches in parts as large as a block is differentiated on at once."""
    given = list(batches)
    return parts_of(given, sequences_at_once(given))


def sequences_of(batches: Sequence[Batch]) -> list[tuple[Batch, int, int]]:
    """Every single sequence as a batch of its own, with its batch's number and its place there."""
    return [
        ({name: tensor[i : i + 1] for name, tensor in batch.items()}, number, i)
        for number, batch in enumerate(batches)
        for i in range(len(next(iter(batch.values()))))
    ]


def forward(stream: Stream, name: str, batches: Sequence[Batch], around: Around = lambda _: nullcontext()) -> list[Activations]:
    """The hidden states before every block and after the last, block i run inside of `around(i)`. Needs `stream.opened`."""
    blocks = stream.blocks
    states = [stream.entered(f"{name}-0", batches)]
    for index in progress(range(len(blocks)), "running the blocks"):
        states.append(Activations(f"{name}-{index + 1}", stream.room))
        with blocks.loaded(blocks.names(index)), around(index):
            for number, batch in enumerate(batches):
                states[-1][number] = blocks.run(index, states[-2][number], blocks.call_of(index, batch))
    return states


def gradients_of(stream: Stream, last: Activations, batches: Sequence[Batch], loss: Loss) -> Activations:
    """The gradients of the sum over all windows of `loss`, of a window and the model's signal, at the hidden states after the
    last block. Needs `stream.opened`."""
    gradients, blocks = Activations("gradients", stream.room), stream.blocks
    rows: dict[int, list[Tensor]] = {}
    with blocks.loaded(blocks.outside()["head"]), torch.enable_grad():
        for window, number, i in sequences_of(batches):
            hidden = blocks.sequence(last[number], i).to(blocks.device).requires_grad_()
            loss(window, blocks.leave(window, hidden)).backward()
            assert hidden.grad is not None
            rows.setdefault(number, []).append(hidden.grad.cpu())
            if i + 1 == last[number].shape[blocks.axis]:
                gradients[number] = torch.cat(rows.pop(number), dim=blocks.axis)
    return gradients


def back(
    stream: Stream,
    index: int,
    before: Activations,
    gradients: Activations,
    batches: Sequence[Batch],
    hand_on: bool,
    see: Callable[[Batch], None] = lambda _: None,
) -> None:
    """Take the gradients back through the loaded block; with `hand_on`, they are those before it from then on. `see` is told
    which batch comes next."""
    blocks = stream.blocks
    for number, batch in enumerate(batches):
        see(batch)
        call = blocks.call_of(index, batch)
        hidden = before[number].to(blocks.device).requires_grad_()
        with torch.enable_grad():
            output = blocks.run(index, hidden, call)
            output.backward(gradients[number].to(blocks.device))
        if hand_on:
            assert hidden.grad is not None
            gradients[number] = hidden.grad


def backward(stream: Stream, states: Sequence[Activations], batches: Sequence[Batch], loss: Loss, around: Around) -> None:
    """Add the gradients of the sum over all windows of `loss` to whatever asks for them inside of `around(block)`. The states,
    those of `forward`, are given back. Needs `stream.opened`."""
    blocks = stream.blocks
    gradients = gradients_of(stream, states[-1], batches, loss)
    states[-1].clear()
    for index in progress(range(len(blocks))[::-1], "taking gradients back"):
        with blocks.loaded(blocks.names(index)), around(index):
            back(stream, index, states[index], gradients, batches, hand_on=index > 0)
        states[index].clear()
    gradients.clear()
