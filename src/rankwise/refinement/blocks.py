"""Block by block: each block's factors are trained to give what the original's block gives, from what the compressed
blocks before it make. So each makes up for those before it (AA-SVD, arXiv 2604.02119), and no gradient leaves a block.

Errors count in proportion to the hidden state that they are of: plain distances would be those of the few tokens whose
hidden states are hundreds of times as long as the others'.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pydantic import ConfigDict, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as options
from torch import Tensor, nn

from rankwise.calibration.signal import device_of, of_tokens
from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.integration.blocks import Blocks, Call
from rankwise.layers.blocks import block_lists, block_of
from rankwise.layers.linear import swapped, tensors_in, with_tensors
from rankwise.masks.descent import Descent, descend, own_parts
from rankwise.masks.student import Layers, Student
from rankwise.progress import progress
from rankwise.refinement.trained import in_training, scales_of, written
from rankwise.run_folder import Checkpoint, as_notes, notes_in

TINY = 1e-30


class Hidden(Protocol):
    """The hidden states of batches by their numbers, on the host."""

    def __getitem__(self, number: int) -> Tensor:
        """Those of a batch."""
        ...

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Set those of a batch."""
        ...


@dataclass(frozen=True)
class _Flow:
    """A batch on its way through the blocks, and how the next one is called."""

    number: int
    batch: Batch
    call: Call


@options(frozen=True, config=ConfigDict(extra="forbid"))
class BlockByBlock:
    """passes: how often each block reads the training text; tokens: of each step; learning_rate: as of `distil`, but larger: an
    error goes no further than its block."""

    passes: PositiveFloat = 3
    tokens: PositiveInt = 1024
    learning_rate: PositiveFloat = 0.06

    def try_out(self, model: Any, matrices: Collection[str], batch: Batch) -> None:
        """Raises `RankwiseError` for a model whose blocks do more than hand on hidden states."""
        _blocks(model, matrices, batch)

    def trained(self, model: nn.Module, matrices: Collection[str]) -> list[str]:
        """Those of the block that has most of them."""
        paths = block_lists(model, matrices)
        places = Counter((path, block_of(name, path)) for path in paths for name in matrices if block_of(name, path) is not None)
        if not places:
            return list(matrices)
        ((path, index), _), *_ = places.most_common(1)
        return [name for name in matrices if block_of(name, path) == index]

    def refine(self, student: Student, layers: Layers, losses: list[float]) -> dict[str, nn.Module]:
        """`losses` gets the mean of each block's last pass."""
        blocks, found = _blocks(student.model, layers, student.training[0]), dict(layers)

        def layers_of(index: int) -> Layers:
            return {name: layer for name, layer in layers.items() if blocks.block_of(name) == index}

        with student.frozen(), torch.no_grad():
            for own in self.in_turn(student, blocks, layers_of, ({}, {}), losses):
                found |= own
        return found

    def in_turn(
        self,
        student: Student,
        blocks: Blocks,
        layers_of: Callable[[int], Layers],
        hidden: tuple[Hidden, Hidden],
        losses: list[float],
    ) -> Iterator[Layers]:
        """The new layers of one block after the other, each while that block is loaded.

        layers_of: the compressed model's layers in a block that is loaded. hidden: where the hidden states of the original and
        of the compressed model are held. Call it where nothing else asks for gradients.
        """
        parts, (original, compressed) = own_parts(student, self.tokens), hidden
        batches = [batch for part in parts for batch in part]
        with blocks.loaded(blocks.outside()["embedding"]):
            for number, batch in enumerate(batches):
                original[number] = compressed[number] = blocks.enter(batch).cpu()
        for index in progress(range(len(blocks)), "refining the blocks"):
            with blocks.loaded(blocks.names(index)):
                flows = [_Flow(number, batch, blocks.call_of(index, batch)) for number, batch in enumerate(batches)]
                with student.as_original():
                    for flow in flows:
                        original[flow.number] = blocks.run(index, original[flow.number], flow.call).cpu()
                own, rest = layers_of(index), iter(flows)
                dealt = [[next(rest) for _ in part] for part in parts]
                train = functools.partial(self._trained, student, blocks, index, own, dealt, hidden)
                saved = student.kept(f"block-{index}", (), train)
                own = with_tensors(own, saved)
                losses += notes_in(saved)
                with swapped(student.model, own):
                    for flow in flows:
                        compressed[flow.number] = blocks.run(index, compressed[flow.number], flow.call).cpu()
                yield own

    def _trained(
        self,
        student: Student,
        blocks: Blocks,
        index: int,
        layers: Layers,
        parts: Sequence[Sequence[_Flow]],
        hidden: tuple[Hidden, Hidden],
    ) -> dict[str, Tensor]:
        """The tensors of one block's layers, trained, and as a note the mean loss of the last pass, if there is one."""
        trained, (original, compressed) = in_training(student, layers), hidden
        if not trained:
            return tensors_in(layers) | as_notes([])

        def add_gradients(part: Sequence[_Flow]) -> tuple[float, int]:
            total, tokens = 0.0, 0
            for flow in part:
                with torch.enable_grad(), swapped(student.model, {**layers, **trained}):
                    wanted = of_tokens(original[flow.number].to(student.device).float(), flow.batch)
                    answer = blocks.run(index, compressed[flow.number], flow.call).float()
                    error = of_tokens(answer, flow.batch) - wanted
                    loss = (error.square().sum(-1) / wanted.square().sum(-1).clamp_min(TINY)).sum()
                loss.backward()
                total, tokens = total + loss.item(), tokens + wanted.shape[:-1].numel()
            return total, tokens

        steps = math.ceil(self.passes * tokens_in(student.training) / self.tokens)
        options = Descent(steps, self.learning_rate, self.tokens, warm_up=0.1)
        alone = replace(student, checkpoint=Checkpoint())  # a block's training is not gone on with, but done again
        losses = list[float]()
        descend(alone, parts, add_gradients, scales_of(trained), options, "training a block", losses)
        return tensors_in(written(trained, layers)) | as_notes([sum(losses[-len(parts) :]) / len(losses[-len(parts) :])])

    def reads(self, training: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward and back."""
        tokens = tokens_in(training)
        return (2 + self.passes) * tokens, self.passes * tokens


def _blocks(model: Any, matrices: Collection[str], batch: Batch) -> Blocks:
    try:
        blocks = Blocks.of(model, matrices, device_of(model))
        blocks.try_out(batch)
    except InMemoryOnlyError as error:
        raise RankwiseError(f"the refinement blocks cannot be used: {error}. Use distil") from None
    return blocks
