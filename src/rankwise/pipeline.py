"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise
from rankwise import distributed, few_bits, slicing, stages, streaming
from rankwise.allocation.allocator import Allocator
from rankwise.allocation.plan import Ranks
from rankwise.allocation.problem import Allocation
from rankwise.asked import Asked, asked_for
from rankwise.calibration.moments import GRADIENTS
from rankwise.decomposition.metric import metric_named
from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.estimate import Clock, Estimate
from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.costs import costs_of_each
from rankwise.evaluation.memory import peak_memory
from rankwise.evaluation.samples import sample_texts
from rankwise.evaluation.size import Size
from rankwise.evaluation.spectra import thinned_spectra
from rankwise.footprint import Shortage
from rankwise.integration.checkpoint import refuse_output
from rankwise.integration.factorise import factorise
from rankwise.integration.quantizer import attach
from rankwise.integration.rehearsal import refuse_unloadable
from rankwise.integration.result import PAGE, SPECTRA, write_result
from rankwise.integration.weights import saving_from
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import Shape, stack_experts, stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.layers.quantised import WIDTHS
from rankwise.masks.layers import folded
from rankwise.masks.student import Student
from rankwise.options import CompressOptions
from rankwise.plain import to_json
from rankwise.plans import Plan
from rankwise.progress import say, stage
from rankwise.recipe import MIXED, Recipe
from rankwise.refinement.blocks import BlockByBlock
from rankwise.refinement.refinement import Refinement
from rankwise.reporting.page import page_of
from rankwise.reporting.read import Result
from rankwise.run_folder import RunFolder
from rankwise.runtime.latency import Latency
from rankwise.schema import VERSION, Report
from rankwise.stages import Calibration
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent
from rankwise.targets import Target

logger = logging.getLogger(__name__)


@dataclass
class Compressed:
    """What `compress` gives back: the model, one rank (or None: dense) per matrix, and the report as plain values.

    Block by block there is no model: it may be larger than the memory, and is in the output folder.
    """

    model: PreTrainedModel | None
    ranks: Ranks
    report: Report
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None = None
    spectra: dict[str, Any] = field(default_factory=dict)

    def save(self, output: str | Path, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face folder, whole or not at all. Raises `RankwiseError` where `output` is taken."""
        if self.model is None:
            raise RankwiseError("the model was written to the output folder, it is not in memory")
        output = Path(output)
        files = to_look_at(output.name, self.report, self.spectra)
        write_result(output, self.model, self.tokenizer, self.ranks, self.report, self.recipe, overwrite, files)

    def hand_over(self, output: Path, folder: RunFolder, overwrite: bool) -> None:
        """Save the result of the run in `folder`, which is over with it; of several processes the first does."""
        if distributed.rank() == 0:
            folder.finish()
            with stage(f"writing {output}"):
                self.save(output, overwrite)
            folder.remove()


def folder_of(output: Path, model: object, resume: bool, overwrite: bool) -> tuple[RunFolder, bool]:
    """The run folder of a result that is to be written to `output`, and whether it may be overwritten. Raises `RankwiseError`
    where the output is taken, or is the `model` itself."""
    folder = RunFolder.beside(output, resume, overwrite)
    overwrite = overwrite or (resume and folder.finished)  # the result there is this run's own
    refuse_output(output, overwrite, model)
    return folder, overwrite


def to_look_at(name: str, report: Report, spectra: dict[str, Any]) -> dict[str, str]:
    """The page of a result, and the spectra that it draws: file name -> content."""
    return {SPECTRA: to_json(spectra) + "\n", PAGE: page_of([Result(name, report, spectra)])}


@torch.inference_mode(False)  # gradients too, whatever the caller has switched off
def compress(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    recipe: Recipe | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[CompressOptions],
) -> Compressed:
    """Compress a language model: remove `rate` of its parameters (0.2 unless told), the rank of every matrix learned.

    model: a folder or a name for `from_pretrained`, or a model in memory, which is compressed in place; None is the bundled
        model. What `decompose` wrote is not decomposed again.
    calibration: a text source (see `read_documents`), "self" for text the model writes itself (the default), documents, each a
        text or a list of messages, windows [windows, length] of whole numbers, or your own batches, each a mapping of the
        model's inputs, as a tokenizer or a DataLoader gives them; a batch whose tensors do not all have one row for each
        sequence (the patches of pictures) is never cut.
    tokenizer: for a model in memory with calibration text.
    allocation: a name, with preset and options where wanted ("llrc:paper", "kl-knapsack points=3"), or an allocator; by default
        "llrc", of an artifact "mask-fisher", whose prices are in it.
    recipe: what is not said here, from a recipe, its file or a result folder.
    plan: instead of a rate, the ranks, as they are: a plan, its file, or the `ranks.json` of a result, edited or not. Matrices
        keep their first components; values that a run has trained are no part of its plan. What is not said here comes from
        the plan's recipe.
    output: where to write the result; with `resume`, an interrupted run goes on from what it had computed.
    options: any other field of `Recipe`, with `target_bytes` and `target_speedup` instead of a rate. A run that does not fit in
        memory goes block by block, as one does where `memory` is promised.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    asked = asked_for(model, rate, calibration, tokenizer, allocation, recipe, plan, options)
    folder = RunFolder()
    if output is not None:
        output = Path(output)
        folder, overwrite = folder_of(output, asked.model, resume, overwrite)
    folder = replace(folder, known=None if asked.artifact is None else asked.artifact.results)
    asked, short = asked.within_memory()
    if asked.recipe.memory is not None:
        with _block_by_block(short):
            return _compress_streamed(asked, output, overwrite, folder, short)
    closer = asked.recipe.effort != "quick"  # matrices are measured by themselves in the end
    with _chosen(asked, folder, closer, loadable=output is not None) as found:
        run, student, masks = found.run, found.student, found.chosen.masks
        costs, tokens = costs_of_each(student, masks, run.data.measuring) if closer else ({}, 0)
        found.clock.lap("looking closer")
        if asked.refinements:
            found = found.refined(asked.refinements)
        samples = sample_texts(student, masks, run.data.measuring, run.tokenizer)
        spectra = thinned_spectra(student.decompositions, masks)
        found.clock.lap("samples")
    report = found.report()
    layers = student.decompositions, masks, run.experts, found.recipe.form, found.chosen.bits, student.shipped
    attach(run.model, factorise(run.model, *layers, sizes=run.sizes))
    report |= {"costs": {"tokens": tokens, "kl": costs}, "samples": samples}
    result = Compressed(run.model, found.chosen.ranks, report, found.recipe, run.tokenizer, spectra)
    if output is not None:
        result.hand_over(output, folder, overwrite)
    return result


@torch.inference_mode(False)
def plan(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    recipe: Recipe | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[CompressOptions],
) -> Plan:
    """Choose the ranks as `compress` does, predict what they cost, and stop there; a model in memory stays as it is.

    output: the file to write the plan to; a run block by block keeps its results beside it. plan: to predict what an edited
    one costs. All others as of `compress`, `RankwiseError` too.
    """
    asked = replace(asked_for(model, rate, calibration, tokenizer, allocation, recipe, plan, options), refinements=[])
    if asked.recipe.bits != "stored":
        raise RankwiseError(f"a plan holds ranks and no bits yet: compress with bits={asked.recipe.bits} without a dry run")
    folder = RunFolder()
    if output is not None:
        output = Path(output)
        if output.is_dir() or (output.exists() and not overwrite):
            raise RankwiseError(f"the plan's file {output} is there already: name another, or overwrite it (--overwrite)")
        folder = RunFolder.beside(output, resume, overwrite)
    folder = replace(folder, known=None if asked.artifact is None else asked.artifact.results)
    asked, short = asked.within_memory()
    if asked.recipe.memory is not None:
        with _block_by_block(short):
            made = _chosen_streamed(asked, folder, short).plan()
    else:
        with _chosen(asked, folder) as found:
            made = found.plan()
        slicing.put_back(found.run.model, found.student.originals)
        stack_experts(found.run.model, found.run.experts)
    if output is not None and distributed.rank() == 0:
        made.save(output)
        folder.remove()
    return made


@dataclass(frozen=True)
class _Chosen:
    """A run whose ranks are chosen and measured. matrices: those that it began with."""

    recipe: Recipe
    run: stages.Run
    student: Student
    chosen: Allocation
    comparison: Comparison
    clock: Clock
    matrices: dict[str, Shape]
    latency: Latency | None = None
    before: Comparison | None = None  # refinement

    def refined(self, refinements: Sequence[Refinement]) -> _Chosen:
        """The same with other values in the layers, measured again."""
        run, student, chosen = self.run, self.student, self.chosen
        layers = {
            name: folded(run.model.get_submodule(name), student.decompositions[name], mask, self.recipe.form)
            for name, mask in chosen.masks.items()
            if mask is not None
        }
        layers |= {name: run.model.get_submodule(name) for name in run.narrow if name not in layers}
        student.shipped, history = stages.refine(run, student, layers, refinements)
        self.clock.lap("refinement")
        after = replace(self, chosen=replace(chosen, history=chosen.history + history), before=self.comparison)
        return replace(after, comparison=stages.measure(student, chosen, run.data.measuring))

    def report(self) -> Report:
        """Plain values, for JSON; the model is still dense, in the dtype it is stored in."""
        with self.student.as_original():
            size = Size.of(self.run.model, self.run.shapes, self.chosen.ranks, self.chosen.bits)
        report = _report(self.recipe, self.run, size, self.comparison, self.chosen, self.clock)
        before = {name: list(weight_of(layer).shape) for name, layer in self.student.originals.items()}
        if before:
            after = {name: report["shapes"][name] for name in before}
            report["shapes"] |= before
            report["narrowed"] = after
            report["neurons"] = {n: [after[n][1], before[n][1]] for n in before if after[n][1] < before[n][1]}
        if self.before is not None:
            report["before_refinement"] = self.before.to_dict()
        if self.latency is not None:
            report["predicted_speedup"] = self.latency.speedup(self.chosen.ranks, self.run.shapes)
        return report

    def plan(self) -> Plan:
        """One rank for every matrix, those that the text did not reach too."""
        ranks = {name: self.chosen.ranks.get(name) for name in self.matrices}
        narrowed = {name: self.run.shapes[name] for name in self.student.originals}
        kept = {
            name: shape.in_features for name, shape in narrowed.items() if shape.in_features < self.matrices[name].in_features
        }
        return Plan(ranks, self.matrices, self.comparison.kl, self.run.base, self.recipe, kept, narrowed)


@contextmanager
def _chosen(asked: Asked, folder: RunFolder, closer: bool = False, loadable: bool = False) -> Iterator[_Chosen]:
    """The way up to the measurement, in memory; while inside, the model is as it computes.

    closer: whether each matrix is measured by itself afterwards; loadable: whether the result is to be written.
    """
    recipe, metric, allocator, artifact = asked.recipe, asked.metric, asked.allocator, asked.artifact
    needs, clock = metric_named(metric).NEEDS, Clock()
    rates, identity = [recipe.rate] if recipe.rate else [], artifact.identity if artifact else None
    gradients = asked.trains or bool(GRADIENTS & needs)

    def rehearse(run: stages.Run) -> None:
        if loadable:
            refuse_unloadable(run.model, run.shapes, run.experts, recipe.form)
        for refinement in asked.refinements:
            refinement.try_out(run.model, run.shapes, run.data.training[0])
        slicing.refuse_other(run, recipe.kept_neurons)
        if recipe.target_bytes is not None:
            Target(recipe).budget(stages.in_metric(run, metric))

    run = stages.start(asked.model, asked.calibration, asked.tokenizer, recipe, rates, folder, identity, gradients, rehearse)
    with stacked_on_failure(run.model, run.experts), slicing.whole_on_failure(run.model):
        run = stages.in_metric(run, metric)
        if artifact is not None:
            run.data = replace(run.data, conversations=artifact.conversations)
        matrices = dict(run.shapes)
        target = Target.of(run, recipe)
        clock.lap("loading")
        with widened(run.model):
            alone, widths = len(run.shapes) * closer, len(WIDTHS) if recipe.bits == MIXED else int(recipe.width is not None)
            clock.estimate = Estimate.of(run, metric, allocator, alone, asked.refinements, widths, recipe.narrows)
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
            run, student = slicing.narrowed(run, student, statistics, metric, budget, shapes, recipe.kept_neurons)
            shapes = target.costs(run)
            clock.lap("narrowing")
        if recipe.bits == MIXED:
            chosen = few_bits.choose_in_bits(run, student, statistics, metric, allocator, budget, recipe.form)
        del statistics  # float64: for a large model more than everything else
        with student.widened():
            if recipe.bits == "stored":
                chosen = stages.allocate(run, student, metric, allocator, budget, shapes)
            clock.lap("allocation")
            comparison = stages.measure(student, chosen, run.data.measuring)
            clock.lap("measuring")
            yield _Chosen(recipe, run, student, chosen, comparison, clock, matrices, target.latency)


@dataclass(frozen=True)
class _Streamed(_Chosen):
    """The same, block by block."""

    student: StreamedStudent
    stream: Stream = field(kw_only=True)


@contextmanager
def _block_by_block(short: Shortage | None) -> Iterator[None]:
    """What does not go block by block inside is refused with the reason why it should. short: where it was not asked for."""
    try:
        yield
    except InMemoryOnlyError as error:
        why = f"the run {short}, and cannot go block by block: {error}; or shorter windows (--length)" if short else ""
        raise RankwiseError(why or f"memory: {error}: leave it out") from None


def _chosen_streamed(asked: Asked, folder: RunFolder, short: Shortage | None) -> _Streamed:
    """As `_chosen`, with one block in memory at a time. Raises `InMemoryOnlyError` for what cannot be done so."""
    recipe, metric, clock = asked.recipe, asked.metric, Clock()
    if recipe.rate is None and recipe.ranks is None:
        raise InMemoryOnlyError("block by block a rate is the only target (ask for one)")
    refinements = [refinement for refinement in asked.refinements if isinstance(refinement, BlockByBlock)]
    if len(refinements) < len(asked.refinements):
        raise InMemoryOnlyError(f"refine={recipe.refine!r} trains the whole model at once (take blocks, or none)")
    if folder.path is None:
        raise InMemoryOnlyError("the result is written as it is made (name an output folder)")
    stream = streaming.start(asked.model, asked.calibration, asked.tokenizer, recipe, asked.allocator, folder)
    if short is not None and distributed.rank() == 0:
        logger.warning("%s: working block by block", short)
    run, matrices = stream.run, dict(stream.run.shapes)
    refuse_unloadable(run.model, run.shapes, run.experts, recipe.form)
    clock.lap("loading")
    place = streaming.OnDisk(stream)
    slicing.refuse_other(run, recipe.kept_neurons, place)
    mlps = slicing.mlps_of(run, Target(recipe).budget(run)[1], place) if recipe.narrows else []
    inside = {name for mlp in mlps for name in mlp.matrices}
    student = streaming.student_of(stream, streaming.decompose_all(stream, metric, inside), metric)
    clock.lap("decomposition")
    _, budget = Target(recipe).budget(run)
    if mlps:
        kept = streaming.Kept(run, metric, stream.blocks.device)
        run, narrow = slicing.narrowed(run, student, kept, metric, budget, run.shapes, recipe.kept_neurons, place)
        assert isinstance(narrow, StreamedStudent)
        student, stream = narrow, narrow.stream
        clock.lap("narrowing")
    chosen = stages.allocate(run, student, metric, asked.allocator, budget)
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
    return _Streamed(recipe, run, student, chosen, comparison, clock, matrices, before=before, stream=stream)


def _compress_streamed(
    asked: Asked, output: Path | None, overwrite: bool, folder: RunFolder, short: Shortage | None
) -> Compressed:
    """`compress` with one block in memory at a time; the result is in `output` only. short: why, where it was not asked for."""
    found = _chosen_streamed(asked, folder, short)
    run, chosen, recipe, report = found.run, found.chosen, found.recipe, found.report()
    if output is not None and distributed.rank() == 0:
        folder.finish()
        compressed, values = streaming.factorise(found.stream, found.student, chosen, recipe.form)
        with saving_from(found.stream.blocks.block_of, values):
            files = to_look_at(output.name, report, thinned_spectra(found.student.decompositions, chosen.masks))
            write_result(output, compressed, run.tokenizer, chosen.ranks, report, recipe, overwrite, files)
        folder.remove()
    return Compressed(None, chosen.ranks, report, recipe, run.tokenizer)


def _report(recipe: Recipe, run: stages.Run, size: Size, comparison: Comparison, chosen: Allocation, clock: Clock) -> Report:
    """Plain values, for JSON."""
    return {
        "version": VERSION,
        "base_model": run.base,
        "rate": recipe.rate or size.achieved(recipe.scope),
        "scope": recipe.scope,
        **size.to_dict(),
        **comparison.to_dict(),
        "ranks": chosen.ranks,
        "bits": chosen.bits,
        "shapes": {name: [shape.out_features, shape.in_features] for name, shape in run.shapes.items()},
        "left_dense": run.left_dense,
        "conversations": run.data.conversations,
        "notes": stages.notes_of(*(size.parameters[scope]["reference"] for scope in ("linear", "model"))),
        "history": chosen.history,
        "effort": chosen.effort,
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "recipe": recipe.model_dump(),
        "versions": {module.__name__: module.__version__ for module in (rankwise, torch, transformers)},
    }
