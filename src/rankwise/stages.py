"""The stages of a run, each with its result in the run folder: what was computed once is read the next time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.allocation.allocator import Allocator
from rankwise.allocation.offer import Offer
from rankwise.allocation.plan import Budget, Ranks, Shapes
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.batches import batches_of
from rankwise.calibration.moments import Collected, KeptStatistics, Moments, Statistics, collect
from rankwise.calibration.signal import Signal, device_of, frozen, signal_of
from rankwise.calibration.tokens import Batch, windows_of
from rankwise.decomposition.metric import decompose_in, metric_named
from rankwise.decomposition.solver import Decomposition
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import Comparison, compare
from rankwise.evaluation.protocols import JudgingText
from rankwise.integration.artifact import decomposition_key, decomposition_stage
from rankwise.layers.linear import tensors_in, weight_of, with_tensors
from rankwise.masks.layers import is_whole
from rankwise.masks.student import Kept, Student
from rankwise.progress import progress
from rankwise.refinement.refinement import Refinement, refined
from rankwise.run_folder import as_notes, digest, notes_in
from rankwise.schema import Costs
from rankwise.starting import Run

S = TypeVar("S", bound=Student)


def collect_statistics(run: Run, needs: frozenset[str]) -> Collected:
    """The moments that `needs` names, in the run folder if there is one. Matrices that the text does not reach are left dense
    from here on."""
    if not needs:
        return Statistics({name: name for name in run.shapes}, {name: Moments() for name in run.shapes})
    stage, key, device = "statistics", digest(run.identity, *run.shapes, *sorted(needs)), device_of(run.model)
    saved = run.folder.together(
        stage, key, lambda: collect(run.model, run.shapes, run.data.training, needs, run.seed).to_tensors()
    )
    statistics = Statistics.from_tensors(saved, device)
    leave_unreached(run, statistics, needs)
    file = run.folder.kept_at(stage, key)
    return statistics if file is None else KeptStatistics(file, statistics.site_of, device)


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
        raise RankwiseError(
            "the calibration reaches none of the matrices that may be compressed: give inputs that do",
        )


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
        chosen = allocator.allocate(problem) if problem.shapes else Allocation({}, {})
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
