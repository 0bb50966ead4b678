"""A run whose model never is in memory as a whole: the stages of `rankwise.stages`, block by block."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, stages
from rankwise.allocation.allocator import FORWARD_ONLY, Allocator
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Allocation
from rankwise.calibration.moments import Moments, Statistics, find_sites, watching
from rankwise.calibration.signal import as_signal, divergence, frozen, token_mask
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import Batch, vocabulary_of
from rankwise.decomposition.metric import is_affine, metric_named
from rankwise.decomposition.solver import Decomposition, decompose
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import Comparison, compare
from rankwise.integration.checkpoint import load_config, load_tokenizer, refuse_compressed, refuse_foreign, resolve_device
from rankwise.integration.quantizer import RankwiseConfig, attach
from rankwise.integration.weights import Read, empty_model
from rankwise.layers.experts import is_stacked
from rankwise.layers.linear import bias_of, swapped, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.matrices import Shape, find_matrices
from rankwise.masks.student import Masks, Student, factorised
from rankwise.progress import progress
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder, digest
from rankwise.stages import Calibration, Run
from rankwise.streaming.activations import Activations, Room, finite
from rankwise.streaming.blocks import Blocks
from rankwise.streaming.memory import Share, bytes_of, share_out, whole_run

GRADIENTS = frozenset({"output", "fisher"})


@dataclass(frozen=True)
class Stored:
    """A decomposition in the run folder, each of its tensors read anew when asked for. The fields of `Decomposition`."""

    file: Path

    def _read(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    @property
    def second(self) -> Tensor:
        return self._read("second")

    @property
    def first(self) -> Tensor:
        return self._read("first")

    @property
    def spectrum(self) -> Tensor:
        return self._read("spectrum")

    def dropped(self, mask: Tensor) -> None:
        """No affine metric gets here."""


@dataclass
class Stream:
    """A `Run` on an empty model, and how its blocks are run."""

    run: Run
    blocks: Blocks
    share: Share
    room: Room

    def matrices_of(self, index: int) -> list[str]:
        """The matrices of a block that may be compressed."""
        return [name for name in self.run.shapes if name.startswith(f"{self.blocks.path}.{index}.")]

    def entered(self, name: str, batches: Sequence[Batch]) -> Activations:
        """The hidden states that reach the first block."""
        hidden = Activations(name, self.room)
        outside = self.blocks.outside()
        with self.blocks.loaded(outside["embedding"]):
            self.blocks.refuse_other_inputs(batches[0])
            for index, batch in enumerate(batches):
                hidden[index] = self.blocks.enter(batch)
        return hidden

    def advance(self, index: int, hidden: Activations, batches: Sequence[Batch]) -> None:
        """Move the hidden states through the loaded block."""
        for number, batch in enumerate(batches):
            hidden[number] = self.blocks.run(index, hidden[number], self.blocks.call_of(index, batch))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The model as it computes: nothing asks for a gradient, what is outside of blocks is loaded but for both ends."""
        with frozen(self.run.model), torch.no_grad(), self.blocks.loaded(self.blocks.outside()["rest"]):
            yield


def start(
    model: str | Path | PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    allocator: Allocator,
    folder: RunFolder,
) -> Stream:
    """As `stages.start`, for a model on disk. Raises `RankwiseError` also for what streaming cannot do, and where the memory
    that was promised is not enough, with what would be."""
    assert recipe.memory is not None
    memory = bytes_of(recipe.memory)
    if isinstance(model, PreTrainedModel):
        raise RankwiseError("memory is for models on disk: give the model's folder or name, or leave memory out")
    if calibration == "self":
        raise RankwiseError("a model that is larger than the memory does not write its own text: name a calibration text")
    if isinstance(calibration, str | Path):
        calibration = read_documents(str(calibration), recipe.text_column, recipe.dataset_options)
    config = load_config(model)
    refuse_compressed(model, config)
    if os.path.isdir(model):
        refuse_foreign(Path(model), config)
    empty, source = empty_model(model, config, recipe.dtype)
    if any(is_stacked(module) for module in empty.modules()):
        raise RankwiseError(f"{type(empty).__name__} has stacked experts, which streaming does not take apart: leave out memory")
    shapes, left_dense = find_matrices(empty, recipe.include, recipe.exclude, recipe.rank_multiple)
    assert recipe.rate is not None
    Budget.of(shapes, recipe.rate, recipe.scope, empty.num_parameters(), recipe.rank_multiple)
    refuse_gradients(recipe, allocator, empty, shapes)
    blocks = Blocks.of(empty, shapes, source, resolve_device(recipe.device))
    tokenizer = tokenizer or load_tokenizer(model)
    data = stages.read_data(empty, calibration, tokenizer, recipe, folder, "")
    everything = (*data.training, *data.selection, *data.measuring)
    share = share_out(memory, blocks, shapes, everything, vocabulary_of(empty))
    names = [name for name, _ in empty.named_parameters()]
    values = [digest(name, source.read(name)) for name in progress(names, "reading the model")]
    identity = digest(str(config), *values, *data.tensors, recipe.seed)
    base = "the bundled model" if model == bundled.MODEL else str(model)
    run = Run(empty, tokenizer, base, shapes, left_dense, [], data, folder, identity, recipe.seed)
    assert folder.path is not None
    return Stream(run, blocks, share, Room(folder.path / "activations", share.activations))


def refuse_gradients(recipe: Recipe, allocator: Allocator, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
    """Raises `RankwiseError` where the metric or the allocator asks for a backward pass, which needs the whole model, and for
    an affine metric."""
    needs = metric_named(str(recipe.decomposition)).NEEDS
    if is_affine(metric_named(str(recipe.decomposition))):
        raise RankwiseError(
            f"with memory there are no affine factors: choose another decomposition than {recipe.decomposition!r}"
        )
    gradients = GRADIENTS & needs
    what = f"the decomposition {recipe.decomposition!r}" if gradients else f"the allocation {recipe.allocation!r}"
    if gradients or not isinstance(allocator, FORWARD_ONLY):
        figure = f"{whole_run(model, shapes, needs) / 1e9:.1f} GB"
        raise RankwiseError(
            f"{what} runs the whole model with its gradients or masks, which takes {figure} and the activations of a batch: "
            "leave out memory where there is as much, or choose --allocation uniform, energy, knapsack, error-bound, "
            "effective-rank, heavy-tail, strs or kl-knapsack on --decomposition whitened, activation or svd"
        )


def decompose_all(stream: Stream, metric: str) -> dict[str, Stored]:
    """Every matrix in the named metric, its statistics collected and forgotten block by block."""
    run, needs = stream.run, metric_named(metric).NEEDS
    key = digest(run.identity, metric)
    missing = {name for name in progress(run.shapes, "looking for results") if not _is_kept(run.folder, metric, name, key)}
    last = max((i for i in range(len(stream.blocks)) if missing & set(stream.matrices_of(i))), default=-1)
    if last >= 0:
        with stream.opened():
            hidden = stream.entered("training", run.data.training) if needs else None
            for index in progress(range(last + 1), "decomposing blocks"):
                with stream.blocks.loaded(stream.blocks.names(index)):
                    wanted = [name for name in stream.matrices_of(index) if name in missing]
                    _decompose_block(stream, index, wanted, hidden, metric, key, forward=index < last)
            if hidden is not None:
                hidden.clear()
    assert run.folder.path is not None
    return {name: Stored(run.folder.path / f"decomposition/{metric}/{name}-{key}.safetensors") for name in run.shapes}


def _is_kept(folder: RunFolder, metric: str, name: str, key: str) -> bool:
    def missing() -> dict[str, Tensor]:
        raise KeyError(name)

    try:
        folder.cached(f"decomposition/{metric}/{name}", key, missing)
    except KeyError:
        return False
    return True


def _decompose_block(
    stream: Stream, index: int, wanted: list[str], hidden: Activations | None, metric: str, key: str, forward: bool
) -> None:
    """Decompose the `wanted` matrices of a loaded block, as many sites at once as there is room for; with `forward`, move the
    hidden states on to the next block."""
    run, roots = stream.run, metric_named(metric).roots
    needs = metric_named(metric).NEEDS
    groups = _groups(stream, index, wanted, hidden) if hidden is not None else [{name: name for name in wanted}]
    for number, group in enumerate(groups):
        on = forward and number == len(groups) - 1
        if hidden is not None:
            statistics = _collect(stream, index, group, hidden, needs, on)
        else:
            statistics = Statistics(group, {name: Moments() for name in group})
        for name in group:
            moments = statistics.of(name)
            if needs and not moments.holds(needs):
                run.left_dense[name] = "the calibration text does not reach it"
                del run.shapes[name]
                continue
            weight = weight_of(run.model.get_submodule(name))

            def compute(moments: Moments = moments, weight: Tensor = weight) -> dict[str, Tensor]:
                d = decompose(weight, *roots(moments)).to(dtype=weight.dtype)
                return {"second": d.second, "first": d.first, "spectrum": d.spectrum}

            try:
                run.folder.cached(f"decomposition/{metric}/{name}", key, compute)
            except RankwiseError as error:
                raise RankwiseError(f"{name}: {error}") from None
    if hidden is not None and forward and not groups:
        _collect(stream, index, {}, hidden, needs, True)


def _groups(stream: Stream, index: int, wanted: list[str], hidden: Activations) -> list[dict[str, str]]:
    """The wanted matrices and their sites, in groups whose moments have room together."""
    if not wanted:
        return []
    probe = {name: tensor[:1] for name, tensor in stream.run.data.training[0].items()}
    call = stream.blocks.call_of(index, probe)
    site_of = find_sites(stream.run.model, wanted, lambda: stream.blocks.run(index, hidden[0][:1], call))
    groups: list[dict[str, str]] = []
    left = 0
    for site in dict.fromkeys(site_of.values()):
        size = 8 * stream.run.shapes[site].in_features ** 2
        if not groups or size > left:
            groups.append({})
            left = stream.share.statistics
        groups[-1] |= {name: s for name, s in site_of.items() if s == site}
        left -= size
    return groups


def _collect(
    stream: Stream, index: int, site_of: Mapping[str, str], hidden: Activations, needs: frozenset[str], forward: bool
) -> Statistics:
    """The moments of these sites of a loaded block over the training text."""
    with watching(stream.run.model, site_of, needs) as watched:
        for number, batch in enumerate(stream.run.data.training):
            watched.mask = token_mask(batch)
            output = stream.blocks.run(index, hidden[number], stream.blocks.call_of(index, batch))
            if not finite(output):
                raise RankwiseError("the model's outputs on the calibration text are not finite")
            if forward:
                hidden[number] = output
    watched.statistics.refuse_not_finite()
    return watched.statistics


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


def factorise(stream: Stream, student: StreamedStudent, chosen: Allocation) -> Read:
    """Give the empty model the low-rank layers of the result; returns where the values of its tensors come from."""
    model, source = stream.run.model, stream.blocks.source
    masks = {name: mask for name, mask in chosen.masks.items() if mask is not None}
    for name, mask in masks.items():
        dense = model.get_submodule(name)
        (m, n), dtype, rank = weight_of(dense).shape, weight_of(dense).dtype, int(mask.count_nonzero())
        model.set_submodule(name, LowRankLinear(n, m, rank, bias_of(dense) is not None, device="meta", dtype=dtype))
    attach(model, RankwiseConfig(ranks={name: rank for name, rank in chosen.ranks.items() if rank is not None}))

    @functools.lru_cache(maxsize=1)
    def layer(name: str) -> dict[str, Tensor]:
        return factorised(student.decompositions[name], masks[name], None).state_dict()

    def read(name: str) -> Tensor:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if path in masks and leaf in ("first", "second"):
            return layer(path)[f"{leaf}.weight"]
        if path.removesuffix(".second") in masks:
            return source.read(path.removesuffix(".second") + ".bias")
        return source.read(name)

    return read
