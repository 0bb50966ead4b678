"""What a run starts with: the model, its matrices, the calibration text, and what may be spent."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled
from rankwise.allocation.given import Given
from rankwise.allocation.plan import Budget, Ranks, Shapes
from rankwise.calibration.batches import refuse_without_gradients
from rankwise.calibration.chat import Conversation, conversation, count_conversations, opening
from rankwise.calibration.data import Data, listed
from rankwise.calibration.own_text import own_windows, refuse_mute
from rankwise.calibration.signal import frozen
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import windows_asked, windows_of
from rankwise.decomposition.metric import is_affine, metric_named
from rankwise.errors import RankwiseError
from rankwise.integration.checkpoint import (
    load_config,
    load_model,
    load_tokenizer,
    refuse_compressed,
    refuse_not_finite,
    refuse_other_than_its_config,
    resolve_device,
)
from rankwise.layers.matrices import Shape, find_matrices, matches, stacked_on_failure, unstack_experts
from rankwise.layers.precision import widened
from rankwise.progress import stage
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder, digest, fingerprint

logger = logging.getLogger(__name__)
Calibration = str | Path | Tensor | Iterable[str | Conversation] | Iterable[Mapping[str, Tensor]]


@dataclass
class Run:
    """A dense model ready to be compressed, its calibration text, and where results are kept.

    identity: the digest of all that statistics depend on. narrow: matrices that are smaller than the original's, and in how many
    parts their outputs lie, each with its own (a gate's and the others'). levels: what a squared error of each matrix in the
    metric's norm costs, nats per token, where it was measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    base: str
    shapes: dict[str, Shape]
    left_dense: dict[str, str]
    experts: list[str]
    data: Data
    folder: RunFolder
    identity: str
    seed: int
    narrow: dict[str, int] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Of each narrower matrix its rows, its columns, and in how many parts the rows lie."""
        return {
            name: [self.shapes[name].out_features, self.shapes[name].in_features, parts] for name, parts in self.narrow.items()
        }


def start(
    model: str | Path | PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    rates: Collection[float],
    folder: RunFolder,
    identity: str | None = None,
    gradients: bool = True,
    rehearse: Callable[[Run], object] = lambda _: None,
) -> Run:
    """Read the text, open the model, find its matrices, check that every rate can be reached, cut the text into batches.

    identity: as of `Run`, where it is known already. gradients: whether statistics or masks take any. rehearse: refuses what
    cannot be done with the run; where the model writes its own text, it sees the run before, with windows of zeros. Raises
    `RankwiseError` for whatever is wrong with these, and leaves a model in memory as it was.
    """
    if isinstance(calibration, str | Path) and calibration != "self":
        calibration = read_documents(str(calibration), recipe.text_column, recipe.dataset_options)
    dense, tokenizer, base = _open(model, recipe, tokenizer)
    experts = unstack_experts(dense)
    with stacked_on_failure(dense, experts):
        shapes, left_dense = find_matrices(dense, recipe.include, recipe.exclude, recipe.rank_multiple, recipe.form)
        for note in notes_of(sum(shape.dense for shape in shapes.values()), dense.num_parameters()):
            logger.warning(note)
        refuse_out_of_reach(dense, shapes, recipe, rates)
        if gradients:
            refuse_without_gradients(dense, shapes)
        of_model = fingerprint(dense) if folder.path and identity is None else ""
        read = functools.partial(read_data, dense, tokenizer=tokenizer, recipe=recipe, folder=folder, identity=of_model)
        data = read(unwritten_windows(dense, recipe) if calibration == "self" else calibration)
        run = Run(dense, tokenizer, base, shapes, left_dense, experts, data, folder, identity or "", recipe.seed)
        rehearse(run)
        if calibration == "self":
            run.data = read("self")
    return replace(run, identity=identity or digest(of_model, *run.data.tensors, recipe.seed))


def unwritten_windows(model: PreTrainedModel, recipe: Recipe) -> Tensor:
    """Windows [3, length] of zeros, as long as those that the model is to write. Raises `RankwiseError` for a model that
    writes none."""
    refuse_mute(model)
    length, _ = windows_asked(model, recipe.effort, resolve_device(recipe.device).type, recipe.length, recipe.samples)
    return torch.zeros(3, length, dtype=torch.int64)


def _open(
    model: str | Path | PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """The dense model, its tokenizer where there is one, and its name."""
    if isinstance(model, PreTrainedModel):
        base = getattr(model.config, "_name_or_path", "") or type(model).__name__
        refuse_compressed(base, model.config)
        refuse_other_than_its_config(model)
        refuse_not_finite(model)
        return model, tokenizer, base
    config = load_config(model)
    refuse_compressed(model, config)
    base = bundled.NAME if model == bundled.MODEL else str(model)
    with stage(f"loading {base}"):
        return load_model(model, config, recipe.dtype, recipe.device), tokenizer or load_tokenizer(model), base


def read_data(
    model: PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    folder: RunFolder,
    identity: str,
) -> Data:
    """The calibration text as batches of `model`, which may be empty unless it writes the text itself."""
    device = resolve_device(recipe.device).type
    length, samples = windows_asked(model, recipe.effort, device, recipe.length, recipe.samples)
    if isinstance(calibration, Tensor):
        return Data.of_windows(model, calibration)
    if calibration == "self":
        begun = opening(tokenizer, length)
        key = digest(identity, length, samples, recipe.seed, *begun)
        with frozen(model), widened(model):
            written = folder.together("text", key, lambda: {"windows": own_windows(model, length, samples, recipe.seed, begun)})
        return replace(Data.of_windows(model, written["windows"]), conversations=samples // 2 if begun else 0)
    documents: Any = listed(calibration)
    if not documents or not isinstance(documents[0], str | list):
        return Data.of_batches(model, documents)
    if tokenizer is None:
        raise RankwiseError("the model has no tokenizer for the calibration text: give one, or windows of tokens")
    documents = [d if isinstance(d, str) else conversation(d, f"conversation {n}") for n, d in enumerate(documents, start=1)]
    data = Data.of_windows(model, windows_of(tokenizer, documents, length, samples, recipe.seed))
    return replace(data, conversations=count_conversations(documents))


def notes_of(compressible: int, parameters: int) -> list[str]:
    """What is worth a line: so few parameters in matrices that may be compressed that a rate of these is little of the model."""
    share = compressible / parameters
    few = f"only {share:.0%} of the model's parameters are in matrices that may be compressed: a rate counts these alone"
    return [f"{few}, unless it is of the whole model (--scope model)"] if share < 0.5 else []


def in_metric(run: Run, metric: str) -> Run:
    """The run with the shapes that matrices have in the named metric: affine factors bring a bias."""
    affine = is_affine(metric_named(metric))
    of = run.model.get_submodule
    return replace(run, shapes={name: Shape.of(of(name), shape.form, affine) for name, shape in run.shapes.items()})


def budget_of(run: Run, recipe: Recipe, rate: float) -> Budget:
    """What `rate` leaves to spend. Raises `RankwiseError` for a rate that cannot be reached."""
    return _budget_of(run.model, run.shapes, recipe, rate)


def _budget_of(model: PreTrainedModel, shapes: Shapes, recipe: Recipe, rate: float) -> Budget:
    budget = Budget.of(shapes, rate, recipe.scope, model.num_parameters(), recipe.rank_multiple)
    return budget.settling(kept_ranks(model, shapes, recipe), shapes)


def refuse_out_of_reach(model: PreTrainedModel, shapes: Shapes, recipe: Recipe, rates: Iterable[float]) -> None:
    """Raises `RankwiseError` for a rate that cannot be reached, and for a plan or patterns to keep of other matrices."""
    if recipe.ranks is not None:
        Given(recipe.ranks).refuse_other(shapes)
    for pattern in recipe.keep:
        if not any(matches(name, model.get_submodule(name), pattern) for name in shapes):
            raise RankwiseError(f"keep: the pattern {pattern!r} matches none of the {len(shapes)} matrices to compress")
    kept_ranks(model, shapes, recipe)
    for rate in rates:
        _budget_of(model, shapes, recipe, rate)


def kept_ranks(model: PreTrainedModel, shapes: Shapes, recipe: Recipe) -> Ranks:
    """The ranks that the recipe's `keep` settles: the largest that the fraction has room for. Raises `RankwiseError` for a
    fraction below the smallest rank's."""
    ranks: Ranks = {}
    for pattern, fraction in recipe.keep.items():
        for name in [name for name in shapes if matches(name, model.get_submodule(name), pattern)]:
            shape, multiple = shapes[name], recipe.rank_multiple
            room = min(shape.rank_within(int(fraction * shape.dense)), shape.largest_rank(multiple)) // multiple * multiple
            if room < multiple and fraction < 1:
                least = shape.parameters(multiple) / shape.dense
                raise RankwiseError(
                    f"keep: {pattern}={fraction} is too little for {name}, where rank {multiple} takes "
                    f"{least:.2%}: keep at least that",
                )
            ranks[name] = None if fraction == 1 else room
    return {name: ranks[name] for name in shapes if name in ranks}
