"""Block by block: each block's factors are trained to give what the original's block gives, from what the compressed
blocks before it make. So each makes up for those before it (AA-SVD, arXiv 2604.02119), and no gradient leaves a block.

Errors count in proportion to the hidden state that they are of: plain distances would be those of the few tokens whose
hidden states are hundreds of times as long as the others'.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from rankwise.refinement.factors import in_training, scales_of, written
from rankwise.run_folder import Checkpoint

TINY = 1e-30
DONE, LOSSES = "__done__", "__losses__"  # beside the layers in a checkpoint: the number of blocks that are done, and their losses


@dataclass
class _Flow:
    """A batch on its way through the blocks: how the next one is called, and the hidden states of the original and of the
    compressed model, on the host."""

    batch: Batch
    call: Call
    original: Tensor
    compressed: Tensor

    @classmethod
    def of(cls, blocks: Blocks, batch: Batch) -> _Flow:
        hidden = blocks.enter(batch).cpu()
        return cls(batch, blocks.call_of(0, batch), hidden, hidden)


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
        blocks = _blocks(student.model, layers, student.training[0])
        found, done = _restored(student.checkpoint, layers, losses)
        alone = replace(student, checkpoint=Checkpoint())  # a block's training is not gone on with, but done again
        with student.frozen(), torch.no_grad():
            parts = [[_Flow.of(blocks, batch) for batch in part] for part in own_parts(student, self.tokens)]
            flows = [flow for part in parts for flow in part]
            for index in progress(range(len(blocks)), "refining the blocks"):
                for flow in flows:
                    flow.call = blocks.call_of(index, flow.batch)
                    flow.original = blocks.run(index, flow.original, flow.call).cpu()
                own = {name: layer for name, layer in found.items() if blocks.block_of(name) == index}
                if index >= done:
                    own = self._trained(alone, blocks, index, own, parts, losses)
                    found |= own
                    student.checkpoint.write(functools.partial(_state, found, index + 1, losses))
                with swapped(student.model, own):
                    for flow in flows:
                        flow.compressed = blocks.run(index, flow.compressed, flow.call).cpu()
        student.checkpoint.remove()
        return found

    def _trained(
        self,
        student: Student,
        blocks: Blocks,
        index: int,
        layers: Layers,
        parts: Sequence[Sequence[_Flow]],
        losses: list[float],
    ) -> dict[str, nn.Module]:
        """The layers of one block, trained."""
        trained = in_training(layers)
        if not trained:
            return dict(layers)

        def add_gradients(part: Sequence[_Flow]) -> tuple[float, int]:
            total, tokens = 0.0, 0
            for flow in part:
                with torch.enable_grad(), swapped(student.model, {**layers, **trained}):
                    wanted = of_tokens(flow.original.to(student.device).float(), flow.batch)
                    error = of_tokens(blocks.run(index, flow.compressed, flow.call).float(), flow.batch) - wanted
                    loss = (error.square().sum(-1) / wanted.square().sum(-1).clamp_min(TINY)).sum()
                loss.backward()
                total, tokens = total + loss.item(), tokens + wanted.shape[:-1].numel()
            return total, tokens

        steps = math.ceil(self.passes * tokens_in(student.training) / self.tokens)
        options = Descent(steps, self.learning_rate, self.tokens, warm_up=0.1)
        own = list[float]()
        descend(student, parts, add_gradients, scales_of(trained), options, "training a block", own)
        losses.append(sum(own[-len(parts) :]) / len(own[-len(parts) :]))
        return written(trained, layers)

    def reads(self, training: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward and back."""
        tokens = tokens_in(training)
        return (2 + self.passes) * tokens, self.passes * tokens


def _blocks(model: Any, matrices: Collection[str], batch: Batch) -> Blocks:
    try:
        blocks = Blocks.of(model, matrices, device_of(model))
        blocks.try_out(batch)
    except InMemoryOnlyError as error:
        raise RankwiseError(f"the refinement blocks: {error} (take distil)") from None
    return blocks


def _state(layers: Mapping[str, nn.Module], done: int, losses: Sequence[float]) -> dict[str, Tensor]:
    return tensors_in(layers) | {DONE: torch.tensor(done), LOSSES: torch.tensor(losses, dtype=torch.float64)}


def _restored(checkpoint: Checkpoint, layers: Layers, losses: list[float]) -> tuple[dict[str, nn.Module], int]:
    """The layers so far, and how many blocks were done."""
    state = checkpoint.read()
    if state is None:
        return dict(layers), 0
    losses += state.pop(LOSSES).tolist()
    done = int(state.pop(DONE))
    return with_tensors(layers, state), done
