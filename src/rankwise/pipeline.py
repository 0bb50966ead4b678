"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise
from rankwise import bundled, distributed, stages, streaming
from rankwise.allocation.allocator import FORWARD_ONLY, Allocator, allocator_named, known_as, spelled
from rankwise.allocation.plan import Ranks
from rankwise.allocation.problem import Allocation
from rankwise.calibration.data import listed
from rankwise.calibration.moments import GRADIENTS
from rankwise.calibration.text import refuse_unused
from rankwise.decomposition.metric import metric_named
from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.estimate import Estimate
from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.costs import costs_of_each
from rankwise.evaluation.memory import peak_memory
from rankwise.evaluation.samples import sample_texts
from rankwise.evaluation.size import Size
from rankwise.evaluation.spectra import thinned_spectra
from rankwise.footprint import Shortage, shortage
from rankwise.integration.artifact import Artifact
from rankwise.integration.checkpoint import refuse_elsewhere, refuse_output
from rankwise.integration.factorise import factorise
from rankwise.integration.quantizer import attach
from rankwise.integration.rehearsal import refuse_unloadable
from rankwise.integration.result import PAGE, SPECTRA, write_result
from rankwise.integration.weights import saving_from
from rankwise.layers.matrices import stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.memory import gigabytes
from rankwise.options import CompressOptions
from rankwise.plain import to_json
from rankwise.progress import say, stage
from rankwise.recipe import IN_MEMORY, Recipe
from rankwise.report.page import page_of
from rankwise.report.read import Result
from rankwise.run_folder import RunFolder
from rankwise.stages import Calibration
from rankwise.targets import Target

logger = logging.getLogger(__name__)


@dataclass
class Compressed:
    """What `compress` gives back: the model, one rank (or None: dense) per matrix, and the report as plain values.

    Block by block there is no model: it may be larger than the memory, and is in the output folder.
    """

    model: PreTrainedModel | None
    ranks: Ranks
    report: dict[str, Any]
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


def to_look_at(name: str, report: dict[str, Any], spectra: dict[str, Any]) -> dict[str, str]:
    """The page of a result, and the spectra that it draws: file name -> content."""
    return {SPECTRA: to_json(spectra) + "\n", PAGE: page_of([Result(name, report, spectra)])}


@dataclass
class _Clock:
    """Seconds of each stage, by name; with an estimate, what is left is said after each."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)
    estimate: Estimate | None = None

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.since = round(now - self.since, 2), now
        logger.info("%s took %.1f s", name, self.seconds[name])
        if self.estimate is not None:
            self.estimate.after(name, self.seconds[name])


@torch.inference_mode(False)  # gradients too, whatever the caller has switched off
def compress(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    recipe: Recipe | str | Path | None = None,
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
    output: where to write the result; with `resume`, an interrupted run goes on from what it had computed.
    options: any other field of `Recipe`, with `target_bytes` and `target_speedup` instead of a rate. A run that does not fit in
        memory goes block by block, as one does where `memory` is promised.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    fields: dict[str, Any] = {**options}
    if recipe is not None:
        read = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        asked = {"rate": rate, "calibration": calibration, "allocation": allocation, **options}
        fields = read.under({name: value for name, value in asked.items() if value is not None})
        rate, calibration, allocation = (fields.pop(name, None) for name in ("rate", "calibration", "allocation"))
    if model is None:
        model, calibration = bundled.MODEL, "stdlib:train" if calibration is None else calibration
    refuse_elsewhere(model)
    calibration = listed(calibration)
    artifact = Artifact.at(model)
    if artifact is not None:
        fields = artifact.options(calibration, fields)
        calibration, allocation = artifact.windows(), "mask-fisher" if allocation is None else allocation
    calibration = "self" if calibration is None else calibration
    recipe, allocator = _recipe(rate, calibration, "llrc" if allocation is None else allocation, fields)
    refuse_unused([recipe.calibration], recipe.text_column, recipe.dataset_options)
    metric = str(recipe.decomposition)
    needs = metric_named(metric).NEEDS
    folder = RunFolder()
    if output is not None:
        folder = RunFolder.beside(Path(output), resume, overwrite)
        overwrite = overwrite or (resume and folder.finished)  # the result there is this run's own
        refuse_output(Path(output), overwrite, model)
    if artifact is not None:
        folder = replace(folder, known=artifact.results)

    if (idle := distributed.idle_gpus(recipe.device)) is not None:
        logger.warning(idle)
    trains = not isinstance(allocator, FORWARD_ONLY)
    short = None if recipe.memory else shortage(model, calibration, recipe, [metric], trains)
    if short is not None:
        recipe = recipe.model_copy(update={"memory": gigabytes(short.promise)})
    if recipe.memory is not None:
        try:
            return _compress_streamed(model, calibration, tokenizer, recipe, allocator, output, overwrite, folder, short)
        except InMemoryOnlyError as error:
            why = f"the run {short}, and cannot go block by block: {error}; or shorter windows (--length)" if short else ""
            raise RankwiseError(why or f"memory: {error}: leave it out") from None
    clock = _Clock()
    rates, identity = [recipe.rate] if recipe.rate else [], artifact.identity if artifact else None
    run = stages.start(model, calibration, tokenizer, recipe, rates, folder, identity, trains or bool(GRADIENTS & needs))
    with stacked_on_failure(run.model, run.experts):
        if output is not None:
            refuse_unloadable(run.model, run.shapes, run.experts, recipe.form)
        run = stages.in_metric(run, metric)
        if artifact is not None:
            run.data = replace(run.data, conversations=artifact.conversations)
        target = Target.of(run, recipe)
        alone = 0 if recipe.effort == "quick" else len(run.shapes)  # matrices that are measured by themselves in the end
        clock.lap("loading")
        with widened(run.model):
            clock.estimate = Estimate.of(run, metric, allocator, alone)
            say(str(clock.estimate))
            statistics = stages.collect_statistics(run, needs)
            clock.lap("calibration")
            student = stages.student_of(run, stages.decompose_all(run, statistics, metric), metric)
            clock.lap("decomposition")
            del statistics  # float64: for a large model more than everything else
        shapes, budget = target.budget(run)
        with widened(run.model):
            chosen = stages.allocate(run, student, metric, allocator, budget, shapes)
            clock.lap("allocation")
            comparison = stages.measure(student, chosen, run.data.measuring)
            clock.lap("measuring")
            costs, tokens = costs_of_each(student, chosen.masks, run.data.measuring) if alone else ({}, 0)
            samples = sample_texts(student, chosen.masks, run.data.measuring, run.tokenizer)
            spectra = thinned_spectra(student.decompositions, chosen.masks)
            clock.lap("looking closer")
        size = Size.of(run.model, run.shapes, chosen.ranks)

    attach(run.model, factorise(run.model, student.decompositions, chosen.masks, run.experts, recipe.form))
    report = _report(recipe, run, size, comparison, chosen, clock)
    report |= {"costs": {"tokens": tokens, "kl": costs}, "samples": samples}
    if target.latency is not None:
        report["predicted_speedup"] = target.latency.speedup(chosen.ranks)
    result = Compressed(run.model, chosen.ranks, report, recipe, run.tokenizer, spectra)
    if output is not None and distributed.rank() == 0:
        folder.finish()
        with stage(f"writing {output}"):
            result.save(output, overwrite)
        folder.remove()
    return result


def _compress_streamed(
    model: str | Path | PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    allocator: Allocator,
    output: str | Path | None,
    overwrite: bool,
    folder: RunFolder,
    short: Shortage | None,
) -> Compressed:
    """`compress` with one block in memory at a time; the result is in `output` only. short: why, where it was not asked for.

    Raises `InMemoryOnlyError` for what cannot be done so.
    """
    if recipe.rate is None:
        raise InMemoryOnlyError("block by block a rate is the only target (ask for one)")
    if output is None:
        raise InMemoryOnlyError("the result is written as it is made (name an output folder)")
    metric, clock = str(recipe.decomposition), _Clock()
    stream = streaming.start(model, calibration, tokenizer, recipe, allocator, folder)
    if short is not None and distributed.rank() == 0:
        logger.warning("%s: working block by block", short)
    refuse_unloadable(stream.run.model, stream.run.shapes, stream.run.experts, recipe.form)
    clock.lap("loading")
    student = streaming.student_of(stream, streaming.decompose_all(stream, metric), metric)
    clock.lap("decomposition")
    run = stream.run
    chosen = stages.allocate(run, student, metric, allocator, stages.budget_of(run, recipe, recipe.rate))
    clock.lap("allocation")
    comparison = streaming.measure(stream, student, chosen)
    stream.narrow()
    distributed.wait()  # the others read the run folder too
    clock.lap("measuring")
    size = Size.of(run.model, run.shapes, chosen.ranks)
    report = _report(recipe, run, size, comparison, chosen, clock)
    if distributed.rank() == 0:
        folder.finish()
        compressed, values = streaming.factorise(stream, student, chosen, recipe.form)
        with saving_from(stream.blocks.block_of, values):
            files = to_look_at(Path(output).name, report, thinned_spectra(student.decompositions, chosen.masks))
            write_result(Path(output), compressed, run.tokenizer, chosen.ranks, report, recipe, overwrite, files)
        folder.remove()
    return Compressed(None, chosen.ranks, report, recipe, run.tokenizer)


def _recipe(
    rate: float | None, calibration: Calibration, allocation: str | Allocator, options: dict[str, Any]
) -> tuple[Recipe, Allocator]:
    """The recipe with the decomposition settled, and its allocator."""
    source = str(calibration) if isinstance(calibration, str | Path) else IN_MEMORY
    name, preset, own = spelled(allocation) if isinstance(allocation, str) else known_as(allocation)
    asked, more = options.get("preset", preset), options.get("options", {})
    if preset not in ("default", asked):
        raise RankwiseError(f"allocation {allocation!r} and preset {asked!r} are two presets: name one")
    options = options | {"preset": asked, "options": {**own, **more} if isinstance(more, Mapping) else more}
    recipe = Recipe.of(**{"rate": rate, "calibration": source, "allocation": name} | options)
    if isinstance(allocation, str):
        allocation = allocator_named(recipe.allocation, recipe.preset, recipe.options)
    return recipe.model_copy(
        update={"decomposition": allocation.decomposition if recipe.decomposition is None else recipe.decomposition}
    ), allocation


def _report(
    recipe: Recipe, run: stages.Run, size: Size, comparison: Comparison, chosen: Allocation, clock: _Clock
) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "base_model": run.base,
        "rate": recipe.rate or size.achieved(recipe.scope),
        "scope": recipe.scope,
        **size.to_dict(),
        **comparison.to_dict(),
        "ranks": chosen.ranks,
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
