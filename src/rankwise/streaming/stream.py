"""A run whose model never is in memory as a whole: it is opened empty, and its blocks are loaded in turn."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, distributed, starting
from rankwise.allocation.allocator import ALLOCATORS, DIFFERENTIATING, FORWARD_ONLY, Allocator
from rankwise.calibration.moments import GRADIENTS
from rankwise.calibration.signal import frozen
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import Batch, sequences_in, written
from rankwise.decomposition.metric import is_affine, metric_named
from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.footprint import whole_run
from rankwise.integration.checkpoint import load_config, load_tokenizer, refuse_compressed, refuse_foreign, resolve_device
from rankwise.integration.source import Source, empty_model
from rankwise.integration.weights import refuse_joined
from rankwise.layers.matrices import Shape, find_matrices
from rankwise.layers.precision import computes_in, to_float32
from rankwise.memory import bytes_of
from rankwise.progress import progress
from rankwise.recipe import Recipe
from rankwise.refinement.blocks import BlockByBlock
from rankwise.refinement.refinement import refinements_named
from rankwise.run_folder import RunFolder, digest
from rankwise.starting import Calibration, Run
from rankwise.streaming.activations import Activations, Room
from rankwise.streaming.blocks import StoredBlocks
from rankwise.streaming.memory import Share, no_room_for_fewer_neurons, share_out

logger = logging.getLogger(__name__)


@dataclass
class Stream:
    """A `Run` on an empty model, and how its blocks are run.

    narrow: gives the empty model the dtypes that it is stored in, where it computes in wider ones. narrows: whether MLPs may lose
    neurons.
    """

    run: Run
    blocks: StoredBlocks
    share: Share
    room: Room
    narrow: Callable[[], None]
    narrows: bool

    @property
    def training(self) -> Sequence[Batch]:
        """This process's part of the text that statistics are collected on."""
        return distributed.dealt(self.run.data.training)

    def matrices_of(self, index: int) -> list[str]:
        """The matrices of a block that may be compressed."""
        return [name for name in self.run.shapes if name.startswith(f"{self.blocks.path}.{index}.")]

    def entered(self, name: str, batches: Sequence[Batch]) -> Activations:
        """The hidden states that reach the first block."""
        hidden = Activations(name, self.room)
        outside = self.blocks.outside()
        with self.blocks.loaded(outside["embedding"]):
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
    neurons_said: bool,
) -> Stream:
    """As `starting.start`, for a model on disk. Where there is no room for fewer neurons, all stay, unless `neurons_said`. Raises
    `InMemoryOnlyError` for what streaming cannot do, and `RankwiseError` also where the memory that was promised is not enough,
    with what would be."""
    assert recipe.memory is not None
    memory = bytes_of(recipe.memory)
    if isinstance(model, PreTrainedModel):
        raise InMemoryOnlyError("a model that is handed over is in memory already (give its folder or name)")
    if calibration == "self":
        raise InMemoryOnlyError("a model that is not in memory does not write its own text (name a calibration text)")
    if isinstance(calibration, str | Path):
        calibration = read_documents(str(calibration), recipe.text_column, recipe.dataset_options)
    config = load_config(model)
    refuse_compressed(model, config)
    if os.path.isdir(model):
        refuse_foreign(Path(model), config)
    empty, source = empty_model(model, config, recipe.dtype)
    shapes, left_dense = find_matrices(empty, recipe.include, recipe.exclude, recipe.rank_multiple, recipe.form)
    device = resolve_device(recipe.device)
    blocks = StoredBlocks.of(empty, shapes, device, source=source)
    refuse_joined(source.skeleton, blocks.block_of)
    for name in [name for name in shapes if blocks.block_of(name) is None]:
        left_dense[name] = "it is outside of the blocks, which alone are compressed block by block"
        del shapes[name]
    starting.refuse_out_of_reach(empty, shapes, recipe, [recipe.rate] if recipe.rate else [])
    refuse_whole_runs(recipe, allocator, empty, shapes)
    tokenizer = tokenizer or load_tokenizer(model)
    data = starting.read_data(empty, calibration, tokenizer, recipe, folder, "")
    narrow = to_float32(empty, lambda tensor: not computes_in(tensor.dtype, device))
    everything = (*data.training, *data.selection, *data.measuring)
    if any(sequences_in(batch) < len(written(batch)) for batch in everything):
        raise InMemoryOnlyError(
            "the calibration batches cannot be split: some tensors do not have one row per "
            "sequence. Give batches of one sequence",
        )
    needs = metric_named(str(recipe.decomposition)).NEEDS
    gradients = bool(GRADIENTS & needs) or isinstance(allocator, DIFFERENTIATING)
    of_a_step = (r.tokens for r in refinements_named(recipe.refine or "") if isinstance(r, BlockByBlock))
    assert folder.path is not None
    narrows = recipe.narrows
    find_lack = functools.partial(no_room_for_fewer_neurons, memory, folder.path, blocks, shapes, needs)
    if narrows and (lack := distributed.of_the_first(find_lack)) is not None:
        if neurons_said:
            raise RankwiseError(f"{lack}: make room, or ask for neurons=all")
        narrows = False
        if distributed.rank() == 0:
            logger.warning("%s: all neurons stay", lack)
    asked = needs, gradients, max(of_a_step, default=0), narrows
    share = share_out(memory, blocks, shapes, everything, *asked)
    if blocks.try_out(everything[0]):
        share = share_out(memory, blocks, shapes, everything, *asked)
    groups = source.together(name for name, _ in empty.named_parameters())
    own = [_digest(source, group) for group in progress(distributed.dealt(groups), "reading the model")]
    identity = digest(str(config), *distributed.collected(own), *empty.buffers(), *data.tensors, recipe.seed)
    base = "the bundled model" if model == bundled.MODEL else str(model)
    run = Run(empty, tokenizer, base, shapes, left_dense, source.experts, data, folder, identity, recipe.seed)
    room = Room(folder.path / f"activations-{distributed.rank()}", share.activations)
    return Stream(run, blocks, share, room, narrow, narrows)


def _digest(source: Source, names: Iterable[str]) -> str:
    return digest(*(digest(name, tensor) for name, tensor in source.values(names)))


def refuse_whole_runs(recipe: Recipe, allocator: Allocator, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
    """Raises `InMemoryOnlyError` for an allocator that trains masks on the whole model, and for an affine metric."""
    metric = metric_named(str(recipe.decomposition))
    if is_affine(metric):
        raise InMemoryOnlyError(
            f"{recipe.decomposition!r} makes affine factors from the whole model (choose another)",
        )
    if not isinstance(allocator, FORWARD_ONLY + DIFFERENTIATING):
        others = [name for name in ALLOCATORS if issubclass(ALLOCATORS[name]["default"], FORWARD_ONLY + DIFFERENTIATING)]
        raise InMemoryOnlyError(
            f"the allocation {recipe.allocation!r} runs the whole model with all of its masks, "
            f"which takes {whole_run(model, shapes, metric.NEEDS) / 1e9:.1f} GB and the "
            f"activations of a batch (choose --allocation {', '.join(others[:-1])} or "
            f"{others[-1]})",
        )
