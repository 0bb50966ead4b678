"""The stages of a run, each with its result in the run folder: what was computed once is read the next time."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, distributed
from rankwise.allocation.allocator import Allocator
from rankwise.allocation.given import Given
from rankwise.allocation.offer import Offer
from rankwise.allocation.plan import Budget, Ranks, Shapes
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.batches import batches_of, refuse_without_gradients
from rankwise.calibration.chat import Conversation, conversation, count_conversations, opening
from rankwise.calibration.data import Data, listed
from rankwise.calibration.moments import Collected, Moments, Statistics, collect
from rankwise.calibration.own_text import own_windows, refuse_mute
from rankwise.calibration.signal import Signal, device_of, frozen, signal_of
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import Batch, windows_asked, windows_of
from rankwise.decomposition.metric import decompose_in, is_affine, metric_named
from rankwise.decomposition.solver import Decomposition
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import Comparison, compare
from rankwise.evaluation.protocols import JudgingText
from rankwise.integration.artifact import decomposition_key, decomposition_stage
from rankwise.integration.checkpoint import (
    load_config,
    load_model,
    load_tokenizer,
    refuse_compressed,
    refuse_not_finite,
    refuse_other_than_its_config,
    resolve_device,
)
from rankwise.layers.linear import tensors_in, weight_of, with_tensors
from rankwise.layers.matrices import Shape, find_matrices, matches, stacked_on_failure, unstack_experts
from rankwise.layers.precision import widened
from rankwise.masks.layers import is_whole
from rankwise.masks.student import Kept, Student
from rankwise.progress import progress, stage
from rankwise.recipe import Recipe
from rankwise.refinement.refinement import Refinement, refined
from rankwise.run_folder import RunFolder, as_notes, digest, fingerprint, notes_in
from rankwise.schema import Costs

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=Student)
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


def collect_statistics(run: Run, needs: frozenset[str]) -> Statistics:
    """The moments that `needs` names. Matrices that the text does not reach are left dense from here on."""
    if not needs:
        return Statistics({name: name for name in run.shapes}, {name: Moments() for name in run.shapes})
    saved = run.folder.together(
        "statistics",
        digest(run.identity, *run.shapes, *sorted(needs)),
        lambda: collect(run.model, run.shapes, run.data.training, needs, run.seed).to_tensors(),
    )
    statistics = Statistics.from_tensors(saved, device_of(run.model))
    leave_unreached(run, statistics, needs)
    return statistics


def leave_unreached(run: Run, statistics: Statistics, needs: frozenset[str]) -> None:
    """Leave dense from here on what these statistics, of some of the matrices or all, did not reach. Raises `RankwiseError` where
    no matrix is left."""
    called = {name for name in statistics.site_of if statistics.of(name).count}
    around = {name.rpartition(".")[0] for name in called}
    for name in [name for name in statistics.site_of if not statistics.of(name).holds(needs)]:
        inside = name.rpartition(".")[0]
        if name in called:
            why = "nothing that the model answers depends on it"
        elif inside in around and not isinstance(run.model.get_submodule(inside), nn.ModuleList):
            why = "the model does not call it, but may read its weight"
        else:
            why = "the calibration text does not reach it"
        run.left_dense[name] = why
        del run.shapes[name]
    if not run.shapes:
        raise RankwiseError("the calibration reaches none of the matrices that may be compressed")


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
                raise RankwiseError(f"keep: {pattern}={fraction} is less than rank {multiple} of {name} takes, {least:.2%}")
            ranks[name] = None if fraction == 1 else room
    return {name: ranks[name] for name in shapes if name in ranks}


def decompose_all(run: Run, statistics: Collected, metric: str) -> dict[str, Decomposition]:
    """Every matrix in the named metric: computed in float64, the factors kept in the model's dtype, on its device."""
    chosen, key = metric_named(metric), decomposition_key(run.identity, metric)

    def decomposed(name: str) -> Decomposition:
        weight = weight_of(run.model.get_submodule(name))

        def compute() -> dict[str, Tensor]:
            d = decompose_in(chosen, weight, statistics.of(name)).to(dtype=weight.dtype)
            return {name: value for name, value in vars(d).items() if value is not None}

        try:
            saved = run.folder.cached(decomposition_stage(metric, name), key, compute)
        except RankwiseError as error:
            raise RankwiseError(f"{name}: {error}") from None
        return Decomposition(**saved).to(weight.device)

    if run.folder.path is not None and distributed.size() > 1:  # each process its part; the others read it
        for name in progress(distributed.dealt(list(run.shapes)), "decomposing"):
            decomposed(name)
        distributed.wait()
    return {name: decomposed(name) for name in progress(run.shapes, "decomposing")}


def student_of(run: Run, decompositions: dict[str, Decomposition], metric: str) -> Student:
    """The masked model over the run's calibration text."""
    kept = kept_in(run, metric)
    return Student(run.model, decompositions, run.data.training, run.data.selection, run.seed, kept=kept)


def kept_in(run: Run, metric: str) -> Kept:
    """What a student measures is kept in the run folder, so that a killed allocation goes on."""

    def kept(what: str, parts: Iterable[Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = digest(run.identity, metric, *parts) if run.folder.keeps else ""
        return run.folder.together(f"measured/{what}", key, compute)

    return kept


def allocate(
    run: Run,
    student: Student,
    metric: str,
    allocator: Allocator,
    budget: Budget,
    shapes: Shapes | None = None,
    offers: Mapping[str, Offer] | None = None,
) -> Allocation:
    """The allocator's answer; the masks are the truth, the ranks are counted from them.

    Of matrices that the budget settles it is not asked, nor of those that no rank makes cheaper: it chooses the others as if
    these were dense.

    shapes: the matrices where they cost something else than parameters. offers: what they may be written as, where bits are to be
    chosen too.
    """
    costs = run.shapes if shapes is None else shapes
    stuck: Ranks = {name: None for name, shape in costs.items() if shape.largest_rank(budget.multiple) == 0}
    budget = replace(budget, settled=stuck | budget.settled)
    settled = {name: rank for name, rank in budget.settled.items() if name in costs}

    def choose() -> dict[str, Tensor]:
        spectra = {name: d.spectrum for name, d in student.decompositions.items()}
        asked, problem = student, Problem(costs, spectra, budget, student, offers or {}, run.levels)
        if settled:
            asked = replace(student, decompositions={n: d for n, d in student.decompositions.items() if n not in settled})
            others = {name: shape for name, shape in costs.items() if name not in settled}
            problem = replace(
                problem,
                shapes=others,
                spectra={name: spectra[name] for name in others},
                budget=budget.of_others(costs),
                student=asked,
            )
        before, since = dict(asked.effort), time.perf_counter() + asked.spared
        chosen = allocator.allocate(problem)
        effort = {"seconds": round(time.perf_counter() + asked.spared - since, 2)}
        effort |= {name: tokens - before[name] for name, tokens in asked.effort.items()}
        masks = chosen.masks | Allocation.of_prefixes(settled, spectra).masks
        notes = as_notes({"history": chosen.history, "effort": effort, "bits": chosen.bits})
        return notes | {name: mask for name, mask in masks.items() if mask is not None}

    offered = [(name, offer.ways, offer.bytes.tolist(), offer.errors.tolist()) for name, offer in (offers or {}).items()]
    key = digest(run.identity, *costs.items(), metric, allocator, budget, *offered, run.levels)
    saved = run.folder.together("allocation", key, choose)
    masks = {name: saved.get(name) for name in run.shapes}
    ranks = {name: None if mask is None or is_whole(mask) else int(mask.count_nonzero()) for name, mask in masks.items()}
    return Allocation(ranks, masks, **notes_in(saved))


def refine(
    run: Run, student: Student, layers: Mapping[str, nn.Module], refinements: Sequence[Refinement], other: Sequence[Batch] = ()
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """The layers of the compressed model after the refinements, of the same sizes, and a record of each step. What raises the KL
    on the `other` text is taken back."""
    history: list[dict[str, Any]] = []
    for refinement in refinements:
        layers, records = _refine(run, student, layers, refinement, other)
        history += records
    return dict(layers), history


def _refine(
    run: Run, student: Student, layers: Mapping[str, nn.Module], refinement: Refinement, other: Sequence[Batch]
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    read = [tensor for batch in other for tensor in batch.values()]
    key = digest(run.identity, refinement, *read, *tensors_in(layers).values()) if run.folder.keeps else ""
    learning = learning_student(run, student, key)

    def compute() -> dict[str, Tensor]:
        found, records = refined(learning, layers, refinement, other)
        return as_notes(records) | tensors_in(found)

    saved = run.folder.together("refinement", key, compute)
    return with_tensors(layers, saved), notes_in(saved)


def learning_student(run: Run, student: S, key: str) -> S:
    """The student whose training is kept in the run folder under the `key`: its state, and what it has finished of it."""

    def kept(what: str, parts: Iterable[Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return run.folder.together(f"refinement/{what}", digest(key, *parts), compute)

    return replace(student, checkpoint=run.folder.checkpoint("refinement", key), kept=kept)


def measure(student: Student, chosen: Allocation, batches: Sequence[Batch]) -> Comparison:
    """The model with the allocation's masks against itself without."""
    model = student.model
    assert isinstance(model, PreTrainedModel)

    def compressed(batch: Batch) -> Signal:
        with student.with_masks(chosen.masks):
            return signal_of(model, batch)

    with frozen(model):
        return compare(student.teacher, compressed, batches, model.can_generate())


def cached_comparison(run: Run, student: Student, chosen: Allocation, batches: Sequence[Batch], key: str) -> Comparison:
    """`measure`, or what it found the last time."""
    found = run.folder.cached_values("comparison", key, lambda: measure(student, chosen, batches).to_dict())
    return Comparison(**found)


def judging_batches(run: Run, documents: Mapping[str, JudgingText], samples: int | None, seed: int) -> dict[str, list[Batch]]:
    """The batches of each text, in windows as long as those of the calibration text; samples: of each, all where None. Raises
    `RankwiseError` for a text that is shorter, and for one without a tokenizer."""
    tokenizer = run.tokenizer
    if not documents:
        return {}
    if tokenizer is None:
        raise RankwiseError(f"{run.base} has no tokenizer for the text to judge on: put the original's beside it")
    length = next(iter(run.data.training[0].values())).shape[1]
    return {
        text: batches_of(run.model, windows_of(tokenizer, found.documents, length, samples, seed)[: found.windows])
        for text, found in documents.items()
    }


def judged(
    run: Run, student: Student, metric: str, chosen: Allocation, judges: Mapping[str, Sequence[Batch]]
) -> dict[str, Costs]:
    """The `Comparison` on each text, as plain values; what was measured once is read."""
    written = [tensor for layer in student.shipped.values() for tensor in layer.state_dict().values()]
    masks = [part for item in chosen.masks.items() for part in item]
    found = {}
    for text, batches in judges.items():
        key = digest(run.identity, metric, *masks, *written, *(t for b in batches for t in b.values()))
        found[text] = cached_comparison(run, student, chosen, batches, key).to_dict()
    return found
