"""A decoder run block by block.

The model's own forward is kept: it makes masks and positions and calls its blocks in turn. Only the blocks are told what to do
by a `forward` of their own: those before the wanted one hand on what they get, the wanted one notes how it is called and stops
it all. So any decoder with one list of blocks works, and the numbers are those of the model in memory.
"""

from __future__ import annotations

import functools
import itertools
from collections import UserDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rankwise.calibration.signal import Signal, call, few_tokens, frozen, signal_of
from rankwise.calibration.tokens import Batch
from rankwise.errors import InMemoryOnlyError, RankwiseError, is_out_of_memory, reason
from rankwise.layers.blocks import block_lists, block_of

UNKNOWN = object()  # what a block that does not run would answer beside its hidden states


class _ReachedError(Exception):
    """The wanted block was called."""


@dataclass(frozen=True)
class Call:
    """How the model calls one of its blocks, its hidden states apart."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def leaves(self) -> list[Any]:
        """Every value in it, in order."""
        return tree_leaves((self.arguments, self.keywords))

    @property
    def shared(self) -> UserDict[str, tuple[Tensor, ...]] | None:
        """Where some blocks put their keys and values [sequences, heads, length, width], which later ones read."""
        return next((leaf for leaf in self.leaves() if isinstance(leaf, UserDict)), None)

    def same(self, other: Call) -> bool:
        """Whether the other has the same tensors in it."""
        pair = [[leaf for leaf in call.leaves() if isinstance(leaf, Tensor)] for call in (self, other)]
        return len(pair[0]) == len(pair[1]) and all(map(torch.equal, *pair))


@dataclass
class Blocks:
    """A model, and the path of its list of blocks.

    What `try_out` finds: width, the numbers that hidden states have for each token, with what blocks share at most; axis, the
        one of sequences in them; reads_embedding, whether blocks are handed more of the embeddings than their hidden states;
        head_by_rows, whether the model's logits can be had a few rows at a time, or it has none.
    """

    model: PreTrainedModel
    path: str
    device: torch.device
    width: int
    axis: int = 0
    reads_embedding: bool = False
    head_by_rows: bool = True
    _answer: Callable[[Tensor], Any] = lambda hidden: hidden  # of a block with these hidden states; known once one was run
    _states: int = 0  # the last axis of hidden states, without the keys and values that later blocks read
    _shared: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # heads and width of these, once they were made

    @classmethod
    def of(cls, model: PreTrainedModel, matrices: Collection[str], device: torch.device, **more: Any) -> Self:
        """The largest list of blocks that holds some of the `matrices`, one that reads text where there is one. Raises
        `InMemoryOnlyError` for a model that is no plain decoder with such a list."""
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise InMemoryOnlyError(f"only decoders go block by block, and {name} has an encoder too")
        lists = block_lists(model, matrices)
        if not lists:
            raise InMemoryOnlyError(f"only a model with a list of blocks goes block by block, and {name} has none")
        try:
            embeddings: Any = model.get_input_embeddings()
            width = embeddings.weight.shape[1]
        except (AttributeError, NotImplementedError):  # some classes do not say where theirs are
            raise InMemoryOnlyError(f"only models of tokens go block by block, and {name} shows no embeddings") from None
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        text = {id(module) for module in model.get_decoder().modules()}
        sizes = {path: sum(parameter.numel() for parameter in blocks.parameters()) for path, blocks in lists.items()}
        path = max(lists, key=lambda path: (id(lists[path]) in text, sizes[path]))
        return cls(model, path, device, width, **more)

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._list)

    @property
    def _list(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_of(self, name: str) -> int | None:
        """The number of the block that a tensor is in; None outside of blocks."""
        return block_of(name, self.path)

    def names(self, index: int) -> list[str]:
        """The parameters of a block."""
        prefix = f"{self.path}.{index}."
        return [prefix + name for name, _ in self._list[index].named_parameters()]

    def outside(self) -> dict[str, list[str]]:
        """The parameters outside of blocks: those of the "embedding", of the "head", and "rest", which is always needed."""
        groups: dict[str, list[str]] = {"embedding": [], "head": [], "rest": []}
        embedding = "rest" if self.reads_embedding else "embedding"
        ends = {id(self.model.get_input_embeddings()): embedding, id(self.model.get_output_embeddings()): "head"}
        for path, module in self.model.named_modules():
            if not path.startswith(f"{self.path}."):
                own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
                groups[ends.get(id(module), "rest")] += own
        return groups

    def loaded(self, names: Collection[str]) -> AbstractContextManager[None]:
        """These parameters with their values on the device while inside: always, where the model is in memory."""
        return nullcontext()

    def enter(self, batch: Batch) -> Tensor:
        """The hidden states that reach the first block. Needs what is outside of blocks loaded, but for the head."""
        hidden, _ = self._reach(0, batch)
        return hidden

    def call_of(self, index: int, batch: Batch) -> Call:
        """How block `index` is called for `batch`. Needs the "rest" loaded."""
        with self._no_embedding():
            return self._reach(index, batch)[1]

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """What the loaded block makes of the hidden states; beside them go the keys and values that later blocks read."""
        hidden, shared = hidden.to(self.device), call.shared
        if shared is not None:
            hidden = self._apart(hidden, shared)
        output = self._list[index](hidden, *call.arguments, **call.keywords)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        if not isinstance(output, Tensor):
            kind, rest = type(output), [part if part is None else UNKNOWN for part in output[1:]]
            self._answer = lambda hidden: kind([hidden, *rest])
        return result if shared is None else self._together(result, shared)

    def _together(self, hidden: Tensor, shared: UserDict[str, tuple[Tensor, ...]]) -> Tensor:
        """The hidden states [..., sequences, length, width], and in the same axis all that is shared, which is forgotten."""
        tensors = [tensor for pair in shared.values() for tensor in pair]
        self._shared |= {key: [(t.shape[1], t.shape[3]) for t in pair] for key, pair in shared.items()}
        shared.clear()
        return torch.cat([hidden, *(t.transpose(1, 2).flatten(2).expand(*hidden.shape[:-1], -1) for t in tensors)], -1)

    def _apart(self, hidden: Tensor, shared: UserDict[str, tuple[Tensor, ...]]) -> Tensor:
        """Undo `_together`."""
        hidden, beside = hidden.tensor_split([self._states], -1)
        beside = beside[(0,) * (beside.ndim - 3)]
        for key, sizes in self._shared.items():
            if beside.shape[-1]:
                *parts, beside = beside.tensor_split(list(itertools.accumulate(heads * width for heads, width in sizes)), -1)
                shared[key] = tuple(p.unflatten(-1, size).transpose(1, 2) for p, size in zip(parts, sizes, strict=True))
        return hidden

    def sequence(self, hidden: Tensor, index: int) -> Tensor:
        """One sequence of hidden states, as a batch."""
        return hidden.narrow(self.axis, index, 1)

    def leave(self, batch: Batch, hidden: Tensor) -> Signal:
        """As `signal_of`, from the last block's hidden states. Needs the "rest" and the head loaded."""
        hidden = hidden.to(self.device)
        last = len(self) - 1

        def answer(index: int, given: Tensor) -> Tensor:
            return hidden[tuple(map(slice, given.shape))] if index == last else given  # the head is tried on a few tokens

        with self._no_embedding(), self._told(answer):
            return signal_of(self.model, batch, self.device)

    @torch.no_grad()
    def try_out(self, batch: Batch) -> bool:
        """Find out how the model calls its blocks, on a few tokens; whether that takes more memory than was to be expected.

        Raises `InMemoryOnlyError` where it does more than handing hidden states from block to block.
        """
        try:
            with frozen(self.model), self.loaded(self.outside()["rest"]):
                return self._tried(few_tokens(batch))
        except Exception as error:  # models read what is not there in as many ways as there are
            if isinstance(error, RankwiseError) or is_out_of_memory(error):
                raise
            if not self.reads_embedding:  # its weight perhaps, without a call
                self.reads_embedding = True
                return self.try_out(batch)
            why = reason(error)
            raise InMemoryOnlyError(f"{type(self.model).__name__} does not run block by block ({why})") from None

    def _tried(self, few: Batch) -> bool:
        random = functools.partial(torch.randn, generator=torch.Generator(self.device).manual_seed(0))
        with self._no_embedding(random):
            hidden, call = self._reach(0, few)
            two = self.enter({name: torch.cat([tensor, tensor]) for name, tensor in few.items()})
        self._states = hidden.shape[-1]
        with self.loaded(self.names(0)):
            answer = self.run(0, hidden, call)[..., : self._states]
        (self.axis,) = (axis for axis, size in enumerate(hidden.shape) if two.shape[axis] != size)
        each = hidden.numel() // next(iter(few.values())).numel()
        width, self.width = self.width, each // self._states * (self._states + self._width_of_shared(call))
        with self.loaded(self.outside()["head"]):
            with self._no_embedding(random):
                others, other = self._outside_of_blocks(few, answer)
            with self._no_embedding():
                calls, signal = self._outside_of_blocks(few, answer)
                alike = [self._reach(index, few, lambda _: answer) for index in range(len(self))]
                order = self._order(few)
        handed_on = all(torch.equal(got, answer) for got, _ in alike[1:]) and order == list(range(len(self)))
        if not handed_on or not all(own.same(call) for call, (_, own) in zip(calls, alike, strict=True)):
            raise InMemoryOnlyError(
                f"{type(self.model).__name__} does more with its blocks than hand on hidden states",
            )
        if not (torch.equal(signal.values, other.values) and all(map(Call.same, calls, others))):
            self.reads_embedding = True
        self.head_by_rows = signal.head is not None or not signal.categorical
        return self.reads_embedding or not self.head_by_rows or self.width > width

    def _width_of_shared(self, call: Call) -> int:
        """The numbers, at most, that blocks share for each token: keys and values of each kind of block. Raises
        `InMemoryOnlyError` where they share them in another way than `Call.shared`."""
        config = self.model.config.get_text_config()
        if not getattr(config, "num_kv_shared_layers", 0):
            return 0
        if call.shared is None:
            raise InMemoryOnlyError(f"later blocks of {type(self.model).__name__} read the keys of earlier ones")
        modules: Any = self._list.named_modules()
        keys = max((module.out_features for name, module in modules if name.endswith("k_proj")), default=self._states)
        return 2 * keys * len(set(config.layer_types))

    def _outside_of_blocks(self, batch: Batch, answer: Tensor) -> tuple[list[Call], Signal]:
        """How every block is called, and what the model makes of the last one's answer."""
        return [self.call_of(index, batch) for index in range(len(self))], self.leave(batch, answer)

    def _order(self, batch: Batch) -> list[int]:
        """The numbers of the blocks, as they are called."""
        order: list[int] = []

        def note(index: int, given: Tensor) -> Tensor:
            order.append(index)
            return given

        with self._told(note):
            call(self.model, batch, self.device)
        return order

    def _reach(self, index: int, batch: Batch, answer: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> tuple[Tensor, Call]:
        """The hidden states that reach a block where those before make `answer` of theirs, and how it is called."""
        reached: list[tuple[Tensor, Call]] = []

        def stop(*arguments: Any, **keywords: Any) -> None:
            hidden = keywords.pop("hidden_states") if "hidden_states" in keywords else arguments[0]
            reached.append((hidden, Call(arguments[1:], keywords)))
            raise _ReachedError

        with self._told(lambda _, given: answer(given)):
            vars(self._list[index])["forward"] = stop
            try:
                call(self.model, batch, self.device)
            except _ReachedError:
                if any(leaf is UNKNOWN for leaf in reached[0][1].leaves()):
                    raise InMemoryOnlyError(
                        f"{type(self.model).__name__} hands its blocks more than the previous hidden states",
                    ) from None
                return reached[0]
        raise InMemoryOnlyError(f"{type(self.model).__name__} does not call its blocks {self.path} in turn")

    @contextmanager
    def _told(self, answer: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """While inside, block i answers `answer(i, the hidden states it is given)`."""

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                given = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
                return self._answer(answer(index, given))

            return forward

        try:
            for index, block in enumerate(self._list):
                vars(block)["forward"] = forward_of(index)
            yield
        finally:
            for block in self._list:
                vars(block).pop("forward", None)

    @contextmanager
    def _no_embedding(self, values: Callable[..., Tensor] = torch.zeros) -> Iterator[None]:
        """While inside, every token has such an embedding where the real one need not be loaded: hidden states are replaced
        anyway."""
        embedding: Any = self.model.get_input_embeddings()
        if self.reads_embedding or "forward" in vars(embedding):
            yield
            return
        width, dtype = embedding.weight.shape[1], embedding.weight.dtype
        vars(embedding)["forward"] = lambda ids: values(*ids.shape, width, dtype=dtype, device=self.device)
        try:
            yield
        finally:
            del vars(embedding)["forward"]
