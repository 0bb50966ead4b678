"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise
from rankwise import bundled, stages
from rankwise.allocation.allocator import Allocator, allocator_named
from rankwise.allocation.plan import Budget, Ranks
from rankwise.allocation.problem import Allocation
from rankwise.decomposition.metric import metric_named
from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.costs import costs_of_each
from rankwise.evaluation.memory import peak_memory
from rankwise.evaluation.samples import sample_texts
from rankwise.evaluation.size import Size
from rankwise.evaluation.spectra import thinned_spectra
from rankwise.integration.checkpoint import refuse_output
from rankwise.integration.quantizer import RankwiseConfig, attach
from rankwise.integration.result import PAGE, SPECTRA, write_result
from rankwise.layers.experts import restack
from rankwise.layers.linear import bias_of
from rankwise.masks.student import Student, factorised
from rankwise.progress import stage
from rankwise.recipe import IN_MEMORY, Recipe
from rankwise.report.page import page_of
from rankwise.report.read import Result
from rankwise.run_folder import RunFolder
from rankwise.stages import Calibration

logger = logging.getLogger(__name__)


@dataclass
class Compressed:
    """What `compress` gives back: the model, one rank (or None: dense) per matrix, and the report as plain values."""

    model: PreTrainedModel
    ranks: Ranks
    report: dict[str, Any]
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None = None
    spectra: dict[str, Any] = field(default_factory=dict)

    def save(self, output: str | Path, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face folder, whole or not at all. Raises `RankwiseError` where `output` is taken."""
        output = Path(output)
        page = page_of([Result(output.name, self.report, self.spectra)])
        files = {SPECTRA: json.dumps(self.spectra) + "\n", PAGE: page}
        write_result(output, self.model, self.tokenizer, self.ranks, self.report, self.recipe, overwrite, files)


@dataclass
class _Clock:
    """Seconds of each stage, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.since = round(now - self.since, 2), now
        logger.info("%s took %.1f s", name, self.seconds[name])


def compress(
    model: str | Path | PreTrainedModel | None = None,
    rate: float = 0.2,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator = "llrc",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Compressed:
    """Compress a language model: remove `rate` of its parameters, the rank of every matrix learned.

    model: a folder or a name for `from_pretrained`, or a model in memory, which is compressed in place; None is the bundled
        model.
    calibration: a text source (see `read_documents`), "self" for text the model writes itself (the default), a list of
        documents, windows [windows, length] int64, or your own batches, each a dict of the model's inputs.
    tokenizer: for a model in memory with calibration text.
    allocation: a name, or an allocator with its options set.
    output: where to write the result; with `resume`, an interrupted run goes on from what it had computed.
    options: any other field of `Recipe`.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    if model is None:
        model, calibration = bundled.MODEL, "stdlib:train" if calibration is None else calibration
    calibration = "self" if calibration is None else calibration
    recipe, allocator = _recipe(rate, calibration, allocation, options)
    metric = str(recipe.decomposition)
    metric_named(metric)
    folder = RunFolder()
    if output is not None:
        refuse_output(Path(output), overwrite, model)
        folder = RunFolder.beside(Path(output), resume, overwrite)

    clock = _Clock()
    run = stages.start(model, calibration, tokenizer, recipe, [recipe.rate], folder)
    clock.lap("loading")
    statistics = stages.collect_statistics(run, metric_named(metric).NEEDS)
    clock.lap("calibration")
    student = stages.student_of(run, stages.decompose_all(run, statistics, metric))
    clock.lap("decomposition")
    budget = Budget.of(run.shapes, recipe.rate, recipe.scope, run.model.num_parameters(), recipe.rank_multiple)
    chosen = stages.allocate(run, student, metric, allocator, budget)
    clock.lap("allocation")
    comparison = stages.measure(student, chosen, run.data.measuring)
    clock.lap("measuring")
    costs, tokens = costs_of_each(student, chosen.masks, run.data.measuring)
    samples = sample_texts(student, chosen.masks, run.data.measuring, run.tokenizer)
    spectra = thinned_spectra(student.decompositions, chosen.masks)
    clock.lap("looking closer")

    size = Size.of(run.model, chosen.ranks)
    attach(run.model, _factorise(student, chosen, run.experts))
    report = _report(recipe, run, size, comparison, chosen, clock)
    report |= {"costs": {"tokens": tokens, "kl": costs}, "samples": samples}
    result = Compressed(run.model, chosen.ranks, report, recipe, run.tokenizer, spectra)
    if output is not None:
        with stage(f"writing {output}"):
            result.save(output, overwrite)
        folder.remove()
    return result


def _recipe(
    rate: float, calibration: Calibration, allocation: str | Allocator, options: dict[str, Any]
) -> tuple[Recipe, Allocator]:
    """The recipe with the decomposition settled, and its allocator."""
    source = str(calibration) if isinstance(calibration, str | Path) else IN_MEMORY
    name = allocation if isinstance(allocation, str) else type(allocation).__name__
    recipe = Recipe.of(rate=rate, calibration=source, allocation=name, **options)
    if isinstance(allocation, str):
        allocation = allocator_named(recipe.allocation, recipe.preset, recipe.options)
    return recipe.model_copy(update={"decomposition": recipe.decomposition or allocation.decomposition}), allocation


def _factorise(student: Student, chosen: Allocation, experts: list[str]) -> RankwiseConfig:
    """Put the low-rank layers into the model for good; experts that are all left dense are stacked again."""
    for name, mask in chosen.masks.items():
        if mask is not None:
            bias = bias_of(student.model.get_submodule(name))
            student.model.set_submodule(name, factorised(student.decompositions[name], mask, bias))
    ranks = {n: r for n, r in chosen.ranks.items() if r is not None}
    kept = [path for path in experts if any(n.startswith(f"{path}.") for n in ranks)]
    for path in set(experts) - set(kept):
        restack(student.model.get_submodule(path))
    return RankwiseConfig(ranks=ranks, experts=kept)


def _report(
    recipe: Recipe, run: stages.Run, size: Size, comparison: Comparison, chosen: Allocation, clock: _Clock
) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "base_model": run.base,
        "rate": recipe.rate,
        "scope": recipe.scope,
        **size.to_dict(),
        **comparison.to_dict(),
        "ranks": chosen.ranks,
        "shapes": {name: [shape.out_features, shape.in_features] for name, shape in run.shapes.items()},
        "left_dense": run.left_dense,
        "history": chosen.history,
        "effort": chosen.effort,
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "recipe": recipe.model_dump(),
        "versions": {module.__name__: module.__version__ for module in (rankwise, torch, transformers)},
    }
