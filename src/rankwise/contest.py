"""Every method at every rate on the very same statistics: which one, at which rate, for this model?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from rankwise import bundled, distributed, narrowing, stages, starting
from rankwise.allocation.allocator import (
    ALLOCATORS,
    FORWARD_ONLY,
    Allocator,
    allocator_named,
    spelled,
    spelling,
)
from rankwise.allocation.plan import Budget, parameters
from rankwise.allocation.problem import Allocation
from rankwise.calibration.moments import GRADIENTS
from rankwise.calibration.text import refuse_unused
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.evaluation.protocols import own_source, read_judging_text
from rankwise.footprint import shortage
from rankwise.integration.checkpoint import refuse_taken
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.masks.student import Student
from rankwise.options import ContestOptions
from rankwise.plain import to_json
from rankwise.recipe import ALL, FEWER, Recipe
from rankwise.run_folder import RunFolder, write_whole
from rankwise.starting import Run

logger = logging.getLogger(__name__)
RESULTS = "results.json"


@dataclass(frozen=True)
class Method:
    """One allocator in one preset on one metric; and whether MLPs may lose neurons."""

    label: str
    allocator: Allocator
    metric: str
    narrows: bool


def methods_of(allocations: Sequence[str], decompositions: Sequence[str], neurons: str | None = None) -> list[Method]:
    """Every allocation on every decomposition; with none given, each on its own. neurons: as of `Recipe`.

    allocations: names, with a preset and options where wanted: "llrc", "llrc:paper", "kl-knapsack points=3 trials=5".
    Raises `RankwiseError` for a name or an option that there is not.
    """
    methods = []
    for allocation in allocations:
        allocator = allocator_named(*spelled(allocation))
        for metric in decompositions or [allocator.decomposition]:
            metric_named(metric)
            narrows = narrowing.by_default(allocator, metric) if neurons is None else neurons == FEWER
            if narrows:
                narrowing.refuse_metric(metric)
            methods.append(Method(f"{allocation} on {metric}", allocator, metric, narrows))
    return methods


def all_allocations() -> list[str]:
    """The names of all there are, with their presets."""
    return [spelling(name, preset) for name, presets in ALLOCATORS.items() for preset in presets]


@torch.inference_mode(False)
def hold_contest(
    model: str | Path | None,
    rates: Sequence[float],
    texts: Sequence[str],
    output: str | Path,
    *,
    allocations: Sequence[str] = (),
    decompositions: Sequence[str] = (),
    calibration: str | None = None,
    judge_samples: int | None = None,
    **options: Unpack[ContestOptions],
) -> list[dict[str, Any]]:
    """Compress `model` by every method at every rate, judge each on held-out `texts`, and write `output`/results.json.

    texts: the first one is the headline; its figures stand at the top of a result, the others' under "texts".
    judge_samples: windows of each text, drawn at random; all of them by default.
    options: as of `Recipe`; neurons that are not said are for each method as in `compress`. What `output` holds from an earlier
        contest is not computed again.
    Returns one result per method and rate. Raises `RankwiseError`.
    """
    if distributed.size() > 1:
        raise RankwiseError("compare runs in one process: run it without torchrun")
    if model is None:
        model, calibration = bundled.MODEL, calibration or "stdlib:train"
    if not texts:
        raise RankwiseError("name a held-out text to judge on (--text)")
    recipe = Recipe.of(rate=max(rates, default=0.0), calibration=calibration or "self", **options)
    methods = methods_of(allocations or all_allocations(), decompositions, recipe.neurons)
    refuse_unused([recipe.calibration, *filter(None, map(own_source, texts))], recipe.text_column, recipe.dataset_options)
    documents = {text: read_judging_text(text, recipe.text_column, recipe.dataset_options) for text in texts}
    output = Path(output)
    refuse_taken(output, overwrite=True)
    folder = RunFolder(output / "run")
    trains = not all(isinstance(method.allocator, FORWARD_ONLY) for method in methods)
    metrics = {method.metric for method in methods}
    neurons = FEWER if any(method.narrows for method in methods) else ALL
    short = shortage(model, recipe.calibration, recipe.model_copy(update={"neurons": neurons}), metrics, trains)
    if short is not None:
        raise short.refusal("compress goes block by block, one method at a time")
    gradients = trains or any(GRADIENTS & metric_named(metric).NEEDS for metric in metrics)

    def rehearse(run: Run) -> dict[str, list[Batch]]:
        _budgets(run, recipe, metrics, rates)
        return stages.judging_batches(run, documents, judge_samples, recipe.seed)

    run = starting.start(model, recipe.calibration, None, recipe, rates, folder, gradients=gradients, rehearse=rehearse)
    with stacked_on_failure(run.model, run.experts), widened(run.model):
        return _judged(run, recipe, rates, methods, rehearse(run), output / RESULTS)


def _judged(
    run: Run,
    recipe: Recipe,
    rates: Sequence[float],
    methods: Sequence[Method],
    judges: Mapping[str, Sequence[Batch]],
    file: Path,
) -> list[dict[str, Any]]:
    """The rows of a contest, written to `file` after each."""
    metrics = dict.fromkeys(method.metric for method in methods)
    statistics = stages.collect_statistics(run, frozenset().union(*(metric_named(metric).NEEDS for metric in metrics)))
    budgets = _budgets(run, recipe, metrics, rates)  # without the matrices that the text does not reach
    results: list[dict[str, Any]] = []
    for metric in metrics:
        here = starting.in_metric(run, metric)
        student = stages.student_of(here, stages.decompose_all(here, statistics, metric), metric)
        for method in (m for m in methods if m.metric == metric):
            for rate, budget in budgets[metric].items():
                with (
                    narrowing.narrowed_inside(here, student, statistics, metric, budget, here.shapes)
                    if method.narrows
                    else nullcontext((here, student)) as own
                ):
                    chosen = stages.allocate(*own, metric, method.allocator, budget)
                    results.append(_row(*own, method, rate, budget, chosen, judges))
                logger.info("%s, rate %s: KL %.5f", method.label, rate, results[-1]["kl"])
                text = to_json(results, indent=1) + "\n"
                write_whole(file, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    return results


def _budgets(run: Run, recipe: Recipe, metrics: Iterable[str], rates: Iterable[float]) -> dict[str, dict[float, Budget]]:
    """What each rate leaves to spend in each metric. Raises `RankwiseError` for one that cannot be reached."""
    return {
        metric: {rate: starting.budget_of(starting.in_metric(run, metric), recipe, rate) for rate in rates} for metric in metrics
    }


def _row(
    run: Run,
    student: Student,
    method: Method,
    rate: float,
    budget: Budget,
    chosen: Allocation,
    judges: Mapping[str, Sequence[Batch]],
) -> dict[str, Any]:
    """What a method chose at a rate, and what that cost on each text."""
    measured = stages.judged(run, student, method.metric, chosen, judges)
    return {
        "method": method.label,
        "rate": rate,
        **next(iter(measured.values())),
        "texts": measured,
        "kept_parameters": parameters(chosen.ranks, run.shapes),
        "budget": budget.parameters,
        "effort": chosen.effort,
        "history": chosen.history,
        "ranks": chosen.ranks,
        "kept": {name: run.shapes[name].parameters(rank) / _whole(student, name).numel() for name, rank in chosen.ranks.items()},
    }


def _whole(student: Student, name: str) -> Tensor:
    """The original's weight."""
    return weight_of(student.originals[name]) if name in student.originals else student.weight(name)
