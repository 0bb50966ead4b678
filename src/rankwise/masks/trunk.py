"""Running a model from one of its blocks on: what the blocks before it answer is known, where they are the original's.

The model's own forward is kept; blocks that need not be run hand on what they get, and the last of them answers what it is known
to answer. So a measurement of one matrix costs what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.calibration.signal import Signal, signal_of
from rankwise.calibration.tokens import Batch
from rankwise.errors import is_out_of_memory
from rankwise.layers.blocks import block_lists, block_of
from rankwise.layers.precision import dtype_of

KEPT_BYTES = 2**30  # the blocks' answers are kept below this size


@dataclass
class Trunk:
    """A model's one list of blocks, and what they answer on some batches.

    sound: whether runs from the middle and of the last block alone gave the model's own signal; tried on the first batch.
    """

    model: nn.Module
    path: str
    blocks: nn.ModuleList
    sound: bool | None = None
    _answers: dict[tuple[int, torch.dtype], tuple[Batch, list[Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, matrices: Collection[str]) -> Trunk | None:
        """None for a model whose matrices are not all in one list of blocks."""
        lists = block_lists(model, matrices)
        if len(lists) != 1:
            return None
        path, blocks = next(iter(lists.items()))
        return cls(model, path, blocks) if all(block_of(matrix, path) is not None for matrix in matrices) else None

    def known(self, batch: Batch, changed: Iterable[str]) -> AbstractContextManager[None]:
        """While inside, blocks before the first of the `changed` layers are not run, if what they answer on `batch` is known or
        can be. Call it with the original's layers in place."""
        first = min((block_of(name, self.path) or 0 for name in changed), default=0)
        if not first or not self._knows(batch):
            return nullcontext()
        return self._from(first, self._answers[self._key(batch)][1])

    def _knows(self, batch: Batch) -> bool:
        if self.sound is not False and self._key(batch) not in self._answers:
            answers, signal = self._observed(batch)
            if self.sound is None:
                starts = len(self.blocks) // 2, len(self.blocks) - 1
                self.sound = all(self._gives(signal, batch, first, answers) for first in starts)
            taken = sum(_bytes(kept) for _, kept in self._answers.values())
            if self.sound and taken + _bytes(answers) <= KEPT_BYTES:
                self._answers[self._key(batch)] = (batch, answers)  # the batch too, lest another one get its id
        return self._key(batch) in self._answers

    def _key(self, batch: Batch) -> tuple[int, torch.dtype]:
        return id(batch), dtype_of(self.model)

    def _gives(self, signal: Signal, batch: Batch, first: int, answers: list[Any]) -> bool:
        """Whether the model gives this signal without its blocks before the `first`."""
        try:
            with self._from(first, answers):
                return torch.equal(signal_of(self.model, batch).values, signal.values)
        except Exception as error:  # of what later blocks read besides: keys and values that earlier ones leave for them
            if is_out_of_memory(error):
                raise
            return False

    def _observed(self, batch: Batch) -> tuple[list[Any], Signal]:
        """What every block answers, and the model's signal."""
        answers: list[Any] = []

        def see(block: nn.Module, inputs: Any, output: Any) -> None:
            answers.append(output)

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(see).remove)
            return answers, signal_of(self.model, batch)

    @contextmanager
    def _from(self, first: int, answers: list[Any]) -> Iterator[None]:
        def forward_of(index: int) -> Callable[..., Any]:
            return lambda *arguments, **keywords: answers[index]

        with ExitStack() as stack:
            for index in range(first):
                stack.callback(vars(self.blocks[index]).pop, "forward", None)
                vars(self.blocks[index])["forward"] = forward_of(index)
            yield


def _bytes(answers: list[Any]) -> int:
    """Of the blocks' answers, tensors or tuples of them."""
    return sum(
        t.nbytes for answer in answers for t in (answer if isinstance(answer, tuple) else (answer,)) if isinstance(t, Tensor)
    )
