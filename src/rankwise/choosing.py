"""The way up to a measured choice: neurons, ranks and bits, whole in memory or block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import transformers

import rankwise
from rankwise import distributed, few_bits, narrowing, stages, starting, streaming
from rankwise.allocation.given import of_plan, ranks_alone
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Allocation
from rankwise.asked import Asked
from rankwise.calibration.moments import GRADIENTS
from rankwise.decomposition.metric import metric_named
from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.estimate import Clock, Estimate
from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.size import Size
from rankwise.footprint import Shortage
from rankwise.integration.rehearsal import refuse_unloadable
from rankwise.layers.matrices import Shape, stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.layers.quantised import WIDTHS
from rankwise.masks.layers import folded
from rankwise.masks.student import Student
from rankwise.memory import give_back, peak_memory
from rankwise.plans import Plan
from rankwise.progress import say
from rankwise.recipe import ALL, MIXED, Recipe
from rankwise.refinement.blocks import BlockByBlock
from rankwise.refinement.refinement import Refinement
from rankwise.run_folder import RunFolder
from rankwise.runtime.latency import Latency
from rankwise.schema import VERSION, Report
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent
from rankwise.targets import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A run whose ranks are chosen and measured. matrices: those that it began with."""

    recipe: Recipe
    run: starting.Run
    student: Student
    chosen: Allocation
    comparison: Comparison
    clock: Clock
    matrices: dict[str, Shape]
    latency: Latency | None = None
    before: Comparison | None = None  # refinement

    def refined(self, refinements: Sequence[Refinement]) -> Chosen:
        """The same with other values in the layers, measured again."""
        run, student, chosen = self.run, self.student, self.chosen
        layers = dict(student.shipped) | {
            name: folded(run.model.get_submodule(name), student.decompositions[name], mask, self.recipe.form)
            for name, mask in chosen.masks.items()
            if mask is not None and name not in student.shipped
        }
        layers |= {name: run.model.get_submodule(name) for name in run.narrow if name not in layers}
        student.shipped, history = stages.refine(run, student, layers, refinements)
        self.clock.lap("refinement")
        after = replace(self, chosen=replace(chosen, history=chosen.history + history), before=self.comparison)
        return replace(after, comparison=stages.measure(student, chosen, run.data.measuring))

    def report(self) -> Report:
        """Plain values, for JSON; the model is still dense, in the dtype it is stored in."""
        recipe, run, chosen = self.recipe, self.run, self.chosen
        with self.student.as_original():
            size = Size.of(run.model, run.shapes, chosen.ranks, chosen.bits)
        report: Report = {
            "version": VERSION,
            "base_model": run.base,
            "rate": recipe.rate or size.achieved(recipe.scope),
            "scope": recipe.scope,
            **size.to_dict(),
            **self.comparison.to_dict(),
            "ranks": chosen.ranks,
            "bits": chosen.bits,
            "shapes": {name: _sides(self.matrices[name]) for name in run.shapes},
            "left_dense": run.left_dense,
            "conversations": run.data.conversations,
            "notes": starting.notes_of(*(size.parameters[scope]["reference"] for scope in ("linear", "model"))),
            "history": chosen.history,
            "effort": chosen.effort,
            "seconds": self.clock.seconds,
            "peak_memory_bytes": peak_memory(),
            "recipe": recipe.model_dump(),
            "versions": {module.__name__: module.__version__ for module in (rankwise, torch, transformers)},
        }
        if run.narrow:
            report["narrowed"] = {name: _sides(run.shapes[name]) for name in run.narrow}
            report["neurons"] = narrowing.neurons_left(run, self.matrices)
        if self.before is not None:
            report["before_refinement"] = self.before.to_dict()
        if self.latency is not None:
            report["predicted_speedup"] = self.latency.speedup(chosen.ranks, run.shapes)
        return report

    def plan(self) -> Plan:
        """A rank for every matrix, those that the text did not reach too, and the bits of those that are written in few."""
        ranks = {name: self.chosen.ranks.get(name) for name in self.matrices}
        narrowed = {name: self.run.shapes[name] for name in self.run.narrow}
        kept = {name: left for name, (left, _) in narrowing.neurons_left(self.run, self.matrices).items()}
        bits = {name: bits for name, bits in self.chosen.bits.items() if name in self.matrices}  # without the tables'
        return Plan(ranks, self.matrices, self.comparison.kl, self.run.base, self.recipe, kept, narrowed, bits)


@contextmanager
def choose(asked: Asked, folder: RunFolder, closer: bool = False, loadable: bool = False) -> Iterator[Chosen]:
    """The way up to the measurement, in memory; while inside, the model is as it computes.

    closer: whether each matrix is measured by itself afterwards; loadable: whether the result is to be written.
    """
    recipe, metric, allocator, artifact = asked.recipe, asked.metric, asked.allocator, asked.artifact
    needs, clock = metric_named(metric).NEEDS, Clock()
    rates, identity = [recipe.rate] if recipe.rate else [], artifact.identity if artifact else None
    gradients = asked.trains or bool(GRADIENTS & needs)

    def rehearse(run: starting.Run) -> None:
        if loadable:
            refuse_unloadable(run.model, run.shapes, run.experts, recipe.form)
        for refinement in asked.refinements:
            refinement.try_out(run.model, run.shapes, run.data.training[0])
        narrowing.refuse_other(run, recipe.kept_neurons)
        if recipe.target_bytes is not None:
            Target(recipe).budget(starting.in_metric(run, metric))

    run = starting.start(asked.model, asked.calibration, asked.tokenizer, recipe, rates, folder, identity, gradients, rehearse)
    with stacked_on_failure(run.model, run.experts), narrowing.whole_on_failure(run.model):
        run = starting.in_metric(run, metric)
        if artifact is not None:
            run.data = replace(run.data, conversations=artifact.conversations)
        matrices = dict(run.shapes)
        target = Target.of(run, recipe)
        clock.lap("loading")
        with widened(run.model):
            alone, told = len(run.shapes) * closer, {*recipe.widths.values()} if recipe.width is None else {recipe.width}
            widths = WIDTHS if recipe.bits == MIXED else told
            choosing = None if recipe.width else allocator
            clock.estimate = Estimate.of(run, metric, choosing, alone, asked.refinements, widths, recipe.narrows)
            say(str(clock.estimate))
            statistics = stages.collect_statistics(run, needs)
            clock.lap("calibration")
            decompositions = {} if recipe.width else stages.decompose_all(run, statistics, metric)
            student = stages.student_of(run, decompositions, metric)
            clock.lap("decomposition")
        if recipe.width is not None:
            chosen = few_bits.alike(run, student, statistics, metric, recipe.width)
        else:
            shapes, budget = target.budget(run)
        if recipe.narrows:
            run, student = narrowing.narrowed(run, student, statistics, metric, budget, shapes, recipe.kept_neurons)
            shapes = target.costs(run)
            clock.lap("narrowing")
        if recipe.bits == MIXED:
            chosen = few_bits.choose_in_bits(run, student, statistics, metric, allocator, budget, recipe.form)
        if recipe.widths:
            chosen = few_bits.as_planned(run, student, statistics, metric, allocator, budget, recipe.widths, recipe.form)
        del statistics  # float64: for a large model more than everything else
        give_back()
        with student.widened():
            if not recipe.in_bits:
                chosen = _allocated(asked, run, student, budget, shapes)
            clock.lap("allocation")
            comparison = stages.measure(student, chosen, run.data.measuring)
            clock.lap("measuring")
            yield Chosen(recipe, run, student, chosen, comparison, clock, matrices, target.latency)


@dataclass(frozen=True)
class Streamed(Chosen):
    """The same, block by block."""

    student: StreamedStudent
    stream: Stream = field(kw_only=True)


@contextmanager
def block_by_block(short: Shortage | None) -> Iterator[None]:
    """What does not go block by block inside is refused with the reason why it should. short: where it was not asked for."""
    try:
        yield
    except InMemoryOnlyError as error:
        way = "Use shorter windows (--length)"
        why = f"the run {short}, and cannot go block by block: {error}. {way}" if short else ""
        raise RankwiseError(
            why or f"memory limits a run by working block by block, but {error}. Run without memory",
        ) from None


def choose_block_by_block(asked: Asked, folder: RunFolder, short: Shortage | None) -> Streamed:
    """As `choose`, with one block in memory at a time. Raises `InMemoryOnlyError` for what cannot be done so."""
    recipe, metric, clock = asked.recipe, asked.metric, Clock()
    if recipe.rate is None and recipe.ranks is None:
        raise InMemoryOnlyError("block by block, only a rate can be the target (ask for one)")
    if recipe.widths:
        raise InMemoryOnlyError("few bits can only be written with the whole model in memory")
    refinements = [refinement for refinement in asked.refinements if isinstance(refinement, BlockByBlock)]
    if len(refinements) < len(asked.refinements):
        raise InMemoryOnlyError(
            f"refine={recipe.refine!r} trains the whole model at once (use blocks, or none)",
        )
    if folder.path is None:
        raise InMemoryOnlyError("the result is written as it is made (name an output folder)")
    stream = streaming.start(asked.model, asked.calibration, asked.tokenizer, recipe, asked.allocator, folder, asked.neurons_said)
    recipe = recipe if stream.narrows else recipe.model_copy(update={"neurons": ALL})
    if short is not None and distributed.rank() == 0:
        logger.warning("%s: working block by block", short)
    run, matrices = stream.run, dict(stream.run.shapes)
    refuse_unloadable(run.model, run.shapes, run.experts, recipe.form)
    clock.lap("loading")
    place = streaming.OnDisk(stream)
    narrowing.refuse_other(run, recipe.kept_neurons, place)
    mlps = narrowing.mlps_of(run, Target(recipe).budget(run)[1], place) if recipe.narrows else []
    inside = {name for mlp in mlps for name in mlp.matrices}
    student = streaming.student_of(stream, streaming.decompose_all(stream, metric, inside), metric)
    clock.lap("decomposition")
    _, budget = Target(recipe).budget(run)
    if mlps:
        kept = streaming.KeptMoments(run, metric, stream.blocks.device)
        run, narrow = narrowing.narrowed(run, student, kept, metric, budget, run.shapes, recipe.kept_neurons, place)
        assert isinstance(narrow, StreamedStudent)
        student, stream = narrow, narrow.stream
        clock.lap("narrowing")
    chosen = _allocated(asked, run, student, budget)
    clock.lap("allocation")
    comparison, before = streaming.measure(stream, student, chosen), None
    if refinements:
        history = streaming.refine(stream, student, chosen, recipe.form, refinements)
        chosen, before = replace(chosen, history=chosen.history + history), comparison
        clock.lap("refinement")
        comparison = streaming.measure(stream, student, chosen)
    stream.narrow()
    distributed.wait()  # the others read the run folder too
    clock.lap("measuring")
    return Streamed(recipe, run, student, chosen, comparison, clock, matrices, before=before, stream=stream)


def _allocated(
    asked: Asked, run: starting.Run, student: Student, budget: Budget, shapes: Mapping[str, Shape] | None = None
) -> Allocation:
    """The allocator's answer; where it is to be a plan, what that gives when it is applied: components are no part of it."""
    if not asked.planning or asked.recipe.ranks is not None:
        return stages.allocate(run, student, asked.metric, asked.allocator, budget, shapes)
    alone = stages.allocate(run, student, asked.metric, ranks_alone(asked.allocator), budget, shapes)
    applied = stages.allocate(run, student, asked.metric, of_plan(alone.ranks, asked.allocator), budget, shapes)
    return replace(applied, history=alone.history + applied.history)


def _sides(shape: Shape) -> list[int]:
    return [shape.out_features, shape.in_features]
