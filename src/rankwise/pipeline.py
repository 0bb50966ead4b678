"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, stages
from rankwise.allocation.allocator import Allocator, allocator_named
from rankwise.allocation.plan import Ranks
from rankwise.allocation.problem import Allocation
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.memory import peak_memory
from rankwise.evaluation.size import Size
from rankwise.integration.artifact import Artifact
from rankwise.integration.checkpoint import refuse_output
from rankwise.integration.factorise import factorise
from rankwise.integration.quantizer import attach
from rankwise.integration.result import write_result
from rankwise.layers.experts import restack
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder
from rankwise.stages import Calibration
from rankwise.targets import Target


@dataclass
class Compressed:
    """What `compress` gives back: the model, one rank (or None: dense) per matrix, and the report as plain values."""

    model: PreTrainedModel
    ranks: Ranks
    report: dict[str, Any]
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None = None

    def save(self, output: str | Path, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face folder, whole or not at all. Raises `RankwiseError` where `output` is taken."""
        write_result(Path(output), self.model, self.tokenizer, self.ranks, self.report, self.recipe, overwrite)


@dataclass
class _Clock:
    """Seconds of each stage, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.since = round(now - self.since, 2), now


def compress(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Compressed:
    """Compress a language model: remove `rate` of its parameters (0.2 unless told), the rank of every matrix learned.

    model: a folder or a name for `from_pretrained`, or a model in memory, which is compressed in place; None is the bundled
        model. What `decompose` wrote is not decomposed again.
    calibration: a text source (see `read_documents`), "self" for text the model writes itself (the default), a list of
        documents, windows [windows, length] int64, or your own batches, each a dict of the model's inputs.
    tokenizer: for a model in memory with calibration text.
    allocation: a name, or an allocator with its options set; by default "llrc", of an artifact "mask-fisher", whose prices are in
        it.
    output: where to write the result; with `resume`, an interrupted run goes on from what it had computed.
    options: any other field of `Recipe`, with `target_bytes` and `target_speedup` instead of a rate.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    if model is None:
        model, calibration = bundled.MODEL, "stdlib:train" if calibration is None else calibration
    artifact = Artifact.at(model)
    if artifact is not None:
        options = artifact.options(calibration, options)
        calibration, allocation = artifact.windows(), allocation or "mask-fisher"
    calibration = "self" if calibration is None else calibration
    recipe, allocator = _recipe(rate, calibration, allocation or "llrc", options)
    metric = str(recipe.decomposition)
    metric_named(metric)
    folder = RunFolder()
    if output is not None:
        refuse_output(Path(output), overwrite, model)
        folder = RunFolder.beside(Path(output), resume, overwrite)
    if artifact is not None:
        folder = replace(folder, known=artifact.results)

    clock = _Clock()
    run = stages.start(
        model,
        calibration,
        tokenizer,
        recipe,
        [recipe.rate] if recipe.rate else [],
        folder,
        artifact.identity if artifact else None,
    )
    run = stages.in_metric(run, metric)
    try:
        target = Target.of(run, recipe)
    except RankwiseError:
        for path in run.experts:
            restack(run.model.get_submodule(path))
        raise
    clock.lap("loading")
    statistics = stages.collect_statistics(run, metric_named(metric).NEEDS)
    clock.lap("calibration")
    student = stages.student_of(run, stages.decompose_all(run, statistics, metric), metric)
    clock.lap("decomposition")
    shapes, budget = target.budget(run)
    chosen = stages.allocate(run, student, metric, allocator, budget, shapes)
    clock.lap("allocation")
    comparison = stages.measure(student, chosen, run.data.measuring)
    clock.lap("measuring")

    size = Size.of(run.model, run.shapes, chosen.ranks)
    attach(run.model, factorise(run.model, student.decompositions, chosen.masks, run.experts))
    report = _report(recipe, run, size, comparison, chosen, clock)
    if target.latency is not None:
        report["predicted_speedup"] = target.latency.speedup(chosen.ranks)
    result = Compressed(run.model, chosen.ranks, report, recipe, run.tokenizer)
    if output is not None:
        result.save(output, overwrite)
        folder.remove()
    return result


def _recipe(
    rate: float | None, calibration: Calibration, allocation: str | Allocator, options: dict[str, Any]
) -> tuple[Recipe, Allocator]:
    """The recipe with the decomposition settled, and its allocator."""
    source = str(calibration) if isinstance(calibration, str | Path) else "given in memory"
    name = allocation if isinstance(allocation, str) else type(allocation).__name__
    recipe = Recipe.of(**{"rate": rate, "calibration": source, "allocation": name} | options)
    if isinstance(allocation, str):
        allocation = allocator_named(recipe.allocation, recipe.preset, recipe.options)
    return recipe.model_copy(update={"decomposition": recipe.decomposition or allocation.decomposition}), allocation


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
        "left_dense": run.left_dense,
        "history": chosen.history,
        "effort": chosen.effort,
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "recipe": recipe.model_dump(),
    }
