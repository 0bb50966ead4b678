"""The student: the model with a mask over the singular components of every matrix, judged against the model as it was."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.calibration.signal import (
    Signal,
    cross_entropy,
    device_of,
    divergence,
    frozen,
    sampled_loss,
    signal_of,
    text_labels,
    with_draws,
)
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.solver import Decomposition
from rankwise.errors import RankwiseError
from rankwise.layers.linear import bias_of, swapped, weight_of
from rankwise.layers.precision import dtype_of, exact, in_float32, widened
from rankwise.masks.layers import MaskedLinear, Masks, folded
from rankwise.masks.trunk import Trunk
from rankwise.progress import progress
from rankwise.run_folder import Checkpoint

Layers = Mapping[str, nn.Module]
Kept = Callable[[str, Iterable[Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]  # what, of what, how -> found
EFFORT = "__effort__"  # beside the tensors of a measurement, which are named after matrices
TEACHER_BYTES = 2**30  # the teacher's signals are kept below this size, and recomputed above it


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of the gradients [sequences, ..., k] to the total [k]."""
    total += exact(gradients).flatten(0, -2).square().sum(0).cpu()


def mean_gradient(parameter: Tensor, tokens: int) -> Tensor:
    """The parameter's gradient in float64 per token of all processes, of which there are `tokens`; zero where none came."""
    own = exact(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return distributed.add_up(own if distributed.size() == 1 else own.cpu()) / tokens


def mean_gradients(masks: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """`mean_gradient` of each mask [k], on the host; `tokens` are this process's."""
    every = sum(distributed.everyones(tokens))
    return {name: mean_gradient(mask, every).cpu() for name, mask in masks.items()}


def not_kept(what: str, parts: Iterable[Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A measurement that is made each time."""
    return compute()


@dataclass
class Student:
    """A model, its decomposed matrices and the batches they are judged on.

    decompositions: matrix -> factors in the model's dtype and on its device.
    training, selection: disjoint batches of calibration text; masks are trained on the one and chosen by the other.
    effort: tokens that went through the student so far, forward and backward.
    spared: seconds that were not spent, because a measurement was found.
    shipped: layers that are known as they will be shipped: those in few bits, and refined ones. Masks say what the others are.
    originals: what the teacher has in place of layers that were narrowed in the model before.
    checkpoint: where a long training keeps its state.
    kept: (what is measured, all that it depends on, a function that measures it) -> the measurement, made now or earlier.
    """

    model: nn.Module
    decompositions: Mapping[str, Decomposition]
    training: Sequence[Batch]
    selection: Sequence[Batch]
    seed: int = 0
    effort: dict[str, int] = field(default_factory=lambda: {"forward_tokens": 0, "backward_tokens": 0})
    spared: float = 0.0
    shipped: Layers = field(default_factory=dict)
    originals: Layers = field(default_factory=dict)
    _signals: dict[tuple[int, torch.dtype], tuple[Batch, Signal]] = field(default_factory=dict)
    kept: Kept = not_kept
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def frozen(self) -> AbstractContextManager[None]:
        """The model's weights frozen and in eval mode while inside."""
        return frozen(self.model)

    def with_masks(self, masks: Masks) -> AbstractContextManager[None]:
        """The model with the kept components only, as it would be shipped, while inside."""
        modules = {
            name: folded(self.model.get_submodule(name), self.decompositions[name], mask)
            for name, mask in masks.items()
            if mask is not None and name not in self.shipped
        }
        return swapped(self.model, modules | {name: self.shipped[name] for name in masks if name in self.shipped})

    def as_original(self) -> AbstractContextManager[None]:
        """The model as it was given, while inside."""
        return swapped(self.model, self.originals)

    def widened(self) -> AbstractContextManager[None]:
        """The model and what is the original's in the dtypes that they compute in, while inside."""
        return widened(self.model, *self.originals.values())

    def exactly(self) -> AbstractContextManager[None]:
        """All of that in float32 while inside: what half precision rounds away is a KL of a thousandth of a nat by itself, as
        much as a matrix costs. Around many measurements the tensors are changed once."""
        return in_float32(self.model, *self.originals.values())

    @property
    def device(self) -> torch.device:
        """Where masks are trained."""
        return device_of(self.model)

    def leaves(self, masks: Masks | None = None) -> dict[str, Tensor]:
        """A mask [k] for every matrix that asks for its gradient: those given, else all ones."""
        given = {name: mask for name, mask in (masks or {}).items() if mask is not None}
        every = {name: torch.ones(len(d.spectrum)) for name, d in self.decompositions.items()} | given
        return {name: mask.detach().float().to(self.device).requires_grad_(True) for name, mask in every.items()}

    def layers_of(self, names: Iterable[str], make: Callable[[str], nn.Module]) -> Mapping[str, nn.Module]:
        """The layer that `make` makes of each matrix, for `swapped` and `differentiate`."""
        return {name: make(name) for name in names}

    def masked(self, masks: Mapping[str, Tensor], see: Callable[[str], Callable[[Tensor], None]] | None = None) -> Layers:
        """Layers of the full-length factors under these masks; `see(name)` is shown the mask's gradient sequence by sequence."""

        def make(name: str) -> MaskedLinear:
            d = self.decompositions[name]
            layer = MaskedLinear(d.second.to(self.device), d.first.to(self.device), self.bias(name), masks[name], d.centre)
            layer.on_gradient = see and see(name)
            return layer

        return self.layers_of(masks, make)

    def differentiate(self, layers: Layers, batches: Iterable[Batch], loss: Callable[[Batch, Signal], Tensor]) -> None:
        """Add the gradients of the sum over the batches of `loss` (of a batch and what the student with these layers says to
        it) to the layers' masks. Call it in `frozen`."""
        for batch in batches:
            with swapped(self.model, layers):
                signal = signal_of(self.model, batch)
            found = loss(batch, signal)
            if found.requires_grad:  # else the batch reaches none of the layers
                found.backward()
            self.count(signal, backward=True)

    def teacher(self, batch: Batch) -> Signal:
        """The signal of the original model, kept while there is room. Call it with no student's layers in place."""
        key = id(batch), dtype_of(self.model)
        if key in self._signals:
            return self._signals[key][1]
        with torch.no_grad(), self.as_original():
            signal = signal_of(self.model, batch).outright()
        self.count(signal)
        if sum(kept.values.nbytes for _, kept in self._signals.values()) + signal.values.nbytes <= TEACHER_BYTES:
            self._signals[key] = (batch, signal)  # the batch too, lest another one get its id
        return signal

    @functools.cached_property
    def _trunk(self) -> Trunk | None:
        return Trunk.of(self.model, self.decompositions)

    def _known(self, batch: Batch, changed: Iterable[str]) -> AbstractContextManager[None]:
        """While inside, the student does not run what the model is known to answer where only these layers are changed."""
        return nullcontext() if self._trunk is None else self._trunk.known(batch, changed)

    def _measured(
        self, what: str, masks: Masks, batches: Sequence[Batch], measure: Callable[[Sequence[Batch]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`measure` of the batches, or what it found before; the effort it took counts either way."""
        before, since = dict(self.effort), time.perf_counter()

        def compute() -> dict[str, Tensor]:
            with self.together():
                found = measure(batches)
            tokens = [self.effort[name] - before[name] for name in before]
            return found | {EFFORT: torch.tensor([*tokens, time.perf_counter() - since], dtype=torch.float64)}

        written = (tensor for name in masks if name in self.shipped for tensor in self.shipped[name].state_dict().values())
        read = (tensor for batch in batches for tensor in batch.values())
        of = (*(part for item in masks.items() for part in item), *self.originals, *written, *read)
        found = dict(self.kept(what, of, compute))
        *tokens, seconds = found.pop(EFFORT).tolist()
        self.effort.update({name: before[name] + int(more) for name, more in zip(before, tokens, strict=True)})
        self.spared += seconds - (time.perf_counter() - since)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every process's student is given while inside counts for all of them."""
        before = dict(self.effort)
        yield
        tokens = distributed.add_up(torch.tensor([self.effort[name] - before[name] for name in before])).tolist()
        self.effort.update({name: before[name] + more for name, more in zip(before, tokens, strict=True)})

    def divergence(self, masks: Masks, batches: Sequence[Batch] | None = None) -> float:
        """KL(original || student) in nats per token over `batches` (the selection text unless told)."""
        text = self.selection if batches is None else batches
        found = self._measured(
            "divergence", masks, text, lambda text: {"kl": torch.tensor(self._divergence(masks, text), dtype=torch.float64)}
        )
        return found["kl"].item()

    def divergence_alone(self, name: str, mask: Tensor, batches: Sequence[Batch]) -> float:
        """KL in nats per token from the model as it is now, narrowed or not, to the same with this matrix masked."""
        with self.exactly():
            return self._as_it_is.divergence({name: mask}, batches)

    @functools.cached_property
    def _as_it_is(self) -> Self:
        """The student whose teacher is the model as it is now."""
        return self._taught_anew() if self.originals else self

    def _taught_anew(self) -> Self:
        return replace(self, originals={}, _signals={})

    def _divergence(self, masks: Masks, batches: Sequence[Batch]) -> float:
        changed = [name for name, mask in masks.items() if mask is not None or name in self.shipped]
        return self._judged(changed, lambda: self.with_masks(masks), batches)

    def cost(self, layers: Layers, batches: Sequence[Batch] | None = None) -> float:
        """As `divergence`, of the model with these layers in place."""
        with self.together():
            return self._judged(layers, lambda: swapped(self.model, layers), self.selection if batches is None else batches)

    @torch.no_grad()
    def _judged(
        self, changed: Iterable[str], inside: Callable[[], AbstractContextManager[None]], batches: Sequence[Batch]
    ) -> float:
        """KL in nats per token from the original to the model that is there `inside`, with these layers changed."""
        parts = []
        with self.frozen():
            for batch in distributed.dealt(batches):
                reference = self.teacher(batch)
                with self._known(batch, changed), inside():
                    parts.append((divergence(reference, signal_of(self.model, batch)).item(), len(reference)))
                self.count(reference)
        totals, tokens = zip(*distributed.collected(parts), strict=True)
        return sum(totals) / sum(tokens)

    def fisher(self, batches: Iterable[Batch] | None = None) -> dict[str, Tensor]:
        """Mask Fisher: half the mean over tokens of the squared gradients of each sequence's loss with respect to each
        mask, all masks at 1 and labels sampled from the model: the KL in nats per token that dropping the component
        costs, to second order. Matrix -> [k] float64."""
        return self._measured("fisher", {}, list(self.training if batches is None else batches), self._fisher)

    def _fisher(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        prices = {name: torch.zeros(len(d.spectrum), dtype=torch.float64) for name, d in self.decompositions.items()}
        layers = self.masked(self.leaves(), lambda name: functools.partial(_add_squares, prices[name]))
        tokens = 0

        def loss(batch: Batch, signal: Signal) -> Tensor:
            nonlocal tokens
            tokens += len(signal)
            return sampled_loss(signal, batch)

        with self.frozen():
            self.differentiate(layers, progress(with_draws(batches, self.seed), "pricing components"), loss)
        tokens = sum(distributed.everyones(tokens))
        return {name: distributed.add_up(price) / (2 * tokens) for name, price in prices.items()}

    def gradients(self, masks: Masks, batches: Iterable[Batch] | None = None) -> dict[str, Tensor]:
        """The gradient of the KL in nats per token with respect to every mask weight, dropped ones too, at `masks`;
        dense matrices are taken with all components kept. Matrix -> [k] float64."""
        text = list(self.training if batches is None else batches)
        return self._measured("gradients", masks, text, lambda text: self._gradients(masks, text))

    def _gradients(self, masks: Masks, batches: Sequence[Batch]) -> dict[str, Tensor]:
        leaves = self.leaves(masks)
        with self.frozen():
            own = progress(distributed.dealt(batches), "gradients at the hard masks")
            _, tokens = self.add_gradients(self.masked(leaves), own)
        return mean_gradients(leaves, tokens)

    def add_gradients(self, layers: Layers, batches: Iterable[Batch]) -> tuple[float, int]:
        """Add the gradients of the KL to the layers' masks; the KL in nats and its tokens. Call it in `frozen`."""
        return self._add_gradients(layers, batches, self.teacher)

    def _add_gradients(self, layers: Layers, batches: Iterable[Batch], original: Callable[[Batch], Signal]) -> tuple[float, int]:
        total, tokens = 0.0, 0

        def loss(batch: Batch, signal: Signal) -> Tensor:
            nonlocal total, tokens
            kl = divergence(original(batch), signal)
            total += kl.item()
            tokens += len(signal)
            return kl

        self.differentiate(layers, batches, loss)
        return total, tokens

    def text_gradients(self, batches: Iterable[Batch] | None = None) -> dict[str, Tensor]:
        """The gradient of the text's own cross entropy in nats per predicted token with respect to every mask weight, all
        masks at 1. Matrix -> [k] float64. Raises `RankwiseError` for a model that predicts no tokens."""
        return self._measured("text-gradients", {}, list(self.training if batches is None else batches), self._text_gradients)

    def _text_gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        leaves = self.leaves()
        causal = getattr(self.model, "can_generate", lambda: False)()
        predicts = causal or getattr(self.model, "get_output_embeddings", lambda: None)() is not None
        tokens = 0

        def loss(batch: Batch, signal: Signal) -> Tensor:
            nonlocal tokens
            if not predicts or not {"input_ids", "decoder_input_ids"} & batch.keys():
                raise RankwiseError(f"{type(self.model).__name__} predicts no tokens of a text: choose another allocation")
            labels = text_labels(batch, causal).to(signal.values.device)
            tokens += int((labels >= 0).sum())
            return cross_entropy(signal, labels)

        with self.frozen():
            own = progress(distributed.dealt(batches), "gradients of the text's loss")
            self.differentiate(self.masked(leaves), own, loss)
        return mean_gradients(leaves, tokens)

    def count(self, signal: Signal, backward: bool = False) -> None:
        """Note the tokens of a call in `effort`."""
        self.effort["forward_tokens"] += len(signal)
        self.effort["backward_tokens"] += len(signal) * backward

    def weight(self, name: str) -> Tensor:
        """The weight [m, n] of a matrix."""
        return weight_of(self.model.get_submodule(name))

    def bias(self, name: str) -> Tensor | None:
        return bias_of(self.model.get_submodule(name))
