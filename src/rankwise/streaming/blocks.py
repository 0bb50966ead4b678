"""A decoder run block by block, one block's weights in memory at a time.

The model's own forward is kept: it makes masks and positions and calls its blocks in turn. Only the blocks are told what to do by
a `forward` of their own: those before the wanted one hand on what they get, the wanted one notes how it is called and stops it
all. So any decoder with one list of blocks works, and the numbers are those of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rankwise.calibration.signal import Signal, few_tokens, frozen, inputs_of, signal_of
from rankwise.calibration.tokens import Batch
from rankwise.errors import InMemoryOnlyError
from rankwise.integration.weights import Source
from rankwise.layers.blocks import block_lists, block_of


class _ReachedError(Exception):
    """The wanted block was called."""


@dataclass(frozen=True)
class Call:
    """How the model calls one of its blocks, its hidden states apart."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, in order."""
        return [leaf for leaf in tree_leaves((self.arguments, self.keywords)) if isinstance(leaf, Tensor)]


@dataclass
class Blocks:
    """An empty model, the path of its list of blocks, and where its weights are.

    gives_tuple: whether blocks return their hidden states in a tuple; known once one was run.
    """

    model: PreTrainedModel
    path: str
    source: Source
    device: torch.device
    gives_tuple: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, matrices: Collection[str], source: Source, device: torch.device) -> Blocks:
        """Raises `InMemoryOnlyError` for a model that is no plain decoder with one list of blocks that holds all `matrices`."""
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise InMemoryOnlyError(f"only decoders go block by block, and {name} has an encoder too")
        found = list(block_lists(model, matrices))
        outside = [matrix for matrix in matrices if not any(block_of(matrix, path) is not None for path in found)]
        if len(found) != 1 or outside:
            what = f"{outside[0]} is in none" if outside else f"it has {', '.join(found) or 'none'}"
            raise InMemoryOnlyError(
                f"only a model whose matrices are all in one list of blocks goes block by block, and of {name} {what} "
                "(--exclude leaves a matrix dense)"
            )
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        return cls(model, found.pop(), source, device)

    def __len__(self) -> int:
        return len(self._list)

    @property
    def _list(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def names(self, index: int) -> list[str]:
        """The parameters of a block."""
        prefix = f"{self.path}.{index}."
        return [prefix + name for name, _ in self._list[index].named_parameters()]

    def outside(self) -> dict[str, list[str]]:
        """The parameters outside of blocks: those of the "embedding", of the "head", and "rest"."""
        groups: dict[str, list[str]] = {"embedding": [], "head": [], "rest": []}
        ends = {id(self.model.get_input_embeddings()): "embedding", id(self.model.get_output_embeddings()): "head"}
        for path, module in self.model.named_modules():
            if not path.startswith(f"{self.path}."):
                own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
                groups[ends.get(id(module), "rest")] += own
        return groups

    @contextmanager
    def loaded(self, names: Collection[str]) -> Iterator[None]:
        """These parameters with their values on the device while inside, empty again afterwards."""
        empty = {}
        try:
            for name in names:
                values = self.source.read(name).to(self.device)
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                empty[name] = module._parameters[leaf]
                module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
                del values
            yield
        finally:
            for name, parameter in empty.items():
                path, _, leaf = name.rpartition(".")
                self.model.get_submodule(path)._parameters[leaf] = parameter

    def enter(self, batch: Batch) -> Tensor:
        """The hidden states [sequences, length, hidden] that reach the first block. Needs what is outside of blocks loaded,
        but for the head."""
        hidden, _ = self._reach(0, batch)
        return hidden

    def refuse_other_inputs(self, batch: Batch) -> None:
        """Raises `InMemoryOnlyError` where blocks are handed more of the embeddings than their hidden states, which would be
        lost. Needs what `enter` needs."""
        _, real = self._reach(0, batch)
        call = self.call_of(0, batch)
        if not all(torch.equal(a, b) for a, b in zip(real.tensors(), call.tensors(), strict=True)):
            name = type(self.model).__name__
            raise InMemoryOnlyError(f"{name} hands its blocks more than the hidden states of the one before")

    def call_of(self, index: int, batch: Batch) -> Call:
        """How block `index` is called for `batch`. Needs the "rest" loaded."""
        with self._no_embedding():
            return self._reach(index, batch)[1]

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """What the loaded block makes of the hidden states."""
        output = self._list[index](hidden.to(self.device), *call.arguments, **call.keywords)
        self.gives_tuple = isinstance(output, tuple)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def leave(self, batch: Batch, hidden: Tensor) -> Signal:
        """As `signal_of`, from the last block's hidden states. Needs the "rest" and the head loaded."""
        hidden = hidden.to(self.device)
        last = len(self) - 1

        def answer(index: int, given: Tensor) -> Tensor:
            return hidden[: given.shape[0], : given.shape[1]] if index == last else given  # the head is tried on a few tokens

        with self._no_embedding(), self._told(answer):
            return signal_of(self.model, batch, self.device)

    @torch.no_grad()
    def head_goes_by_rows(self, batch: Batch) -> bool:
        """Whether the model's logits can be had a few rows at a time, or it has none."""
        few = few_tokens(batch)
        sequences, length = next(iter(few.values())).shape[:2]
        outside = self.outside()
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(sequences, length, self.model.config.get_text_config().hidden_size, generator=generator)
        with frozen(self.model), self.loaded(outside["rest"]):
            with self.loaded(self.names(0)):
                hidden = self.run(0, hidden.to(self.model.dtype), self.call_of(0, few))
            with self.loaded(outside["head"]):
                signal = self.leave(few, hidden)
        return signal.head is not None or not signal.categorical

    def _forward(self, batch: Batch) -> Any:
        return self.model(**inputs_of(batch, self.device))

    def _reach(self, index: int, batch: Batch) -> tuple[Tensor, Call]:
        reached: list[tuple[Tensor, Call]] = []

        def stop(*arguments: Any, **keywords: Any) -> None:
            hidden = keywords.pop("hidden_states") if "hidden_states" in keywords else arguments[0]
            reached.append((hidden, Call(arguments[1:], keywords)))
            raise _ReachedError

        with self._told(lambda i, given: given):
            vars(self._list[index])["forward"] = stop
            try:
                self._forward(batch)
            except _ReachedError:
                return reached[0]
        raise InMemoryOnlyError(f"{type(self.model).__name__} does not call its blocks {self.path} in turn")

    @contextmanager
    def _told(self, answer: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """While inside, block i answers `answer(i, the hidden states it is given)`."""

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                hidden = answer(index, keywords["hidden_states"] if "hidden_states" in keywords else arguments[0])
                return (hidden,) if self.gives_tuple else hidden

            return forward

        try:
            for index, block in enumerate(self._list):
                vars(block)["forward"] = forward_of(index)
            yield
        finally:
            for block in self._list:
                vars(block).pop("forward", None)

    @contextmanager
    def _no_embedding(self) -> Iterator[None]:
        """While inside, every token's embedding is zero: where hidden states are replaced anyway it need not be loaded."""
        embedding: Any = self.model.get_input_embeddings()
        shape, dtype = embedding.weight.shape, embedding.weight.dtype
        with ExitStack() as stack:
            stack.callback(vars(embedding).pop, "forward", None)
            vars(embedding)["forward"] = lambda ids: torch.zeros((), dtype=dtype, device=ids.device).expand(*ids.shape, shape[1])
            yield
