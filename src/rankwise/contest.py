"""Every method at every rate on the very same statistics: which one, at which rate, for this model?"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import bundled, distributed, stages
from rankwise.allocation.allocator import ALLOCATORS, Allocator, allocator_named
from rankwise.allocation.plan import parameters
from rankwise.calibration.tokens import batches_of, windows_of
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.evaluation.protocols import read_judging_text
from rankwise.integration.checkpoint import refuse_taken
from rankwise.recipe import Recipe, pairs
from rankwise.run_folder import RunFolder, digest, write_whole

logger = logging.getLogger(__name__)
RESULTS = "results.json"


@dataclass(frozen=True)
class Method:
    """One allocator in one preset on one metric."""

    label: str
    allocator: Allocator
    metric: str


def methods_of(allocations: Sequence[str], decompositions: Sequence[str]) -> list[Method]:
    """Every allocation on every decomposition; with none given, each on its own.

    allocations: a name, with a preset and options where wanted: "llrc", "llrc:paper", "kl-knapsack points=3 trials=5".
    Raises `RankwiseError` for a name or an option that there is not.
    """
    methods = []
    for allocation in allocations:
        full_name, *options = allocation.split()
        name, _, preset = full_name.partition(":")
        allocator = allocator_named(name, preset or "default", pairs(options))
        for metric in decompositions or [allocator.decomposition]:
            metric_named(metric)
            methods.append(Method(f"{allocation} on {metric}", allocator, metric))
    return methods


def all_allocations() -> list[str]:
    """The names of all there are, with their presets."""
    return [name if preset == "default" else f"{name}:{preset}" for name, presets in ALLOCATORS.items() for preset in presets]


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
    **options: Any,
) -> list[dict[str, Any]]:
    """Compress `model` by every method at every rate, judge each on held-out `texts`, and write `output`/results.json.

    texts: the first one is the headline; its figures stand at the top of a result, the others' under "texts".
    judge_samples: windows of each text, drawn at random; all of them by default.
    options: as of `Recipe`, `allocation` apart. What `output` holds from an earlier contest is not computed again.
    Returns one result per method and rate. Raises `RankwiseError`.
    """
    if distributed.size() > 1:
        raise RankwiseError("compare works in one process: several share the work of compress alone")
    if model is None:
        model, calibration = bundled.MODEL, calibration or "stdlib:train"
    if not texts:
        raise RankwiseError("name a held-out text to judge on (--text)")
    methods = methods_of(allocations or all_allocations(), decompositions)
    recipe = Recipe.of(rate=max(rates, default=0.0), calibration=calibration or "self", **options)
    documents = {text: read_judging_text(text, recipe.text_column, recipe.dataset_options) for text in texts}
    output = Path(output)
    refuse_taken(output, overwrite=True)
    folder = RunFolder(output / "run")
    run = stages.start(model, recipe.calibration, None, recipe, rates, folder)
    metrics = dict.fromkeys(method.metric for method in methods)
    budgets = {metric: {r: stages.budget_of(stages.in_metric(run, metric), recipe, r) for r in rates} for metric in metrics}
    if run.tokenizer is None:
        raise RankwiseError(f"{model} has no tokenizer")
    length = next(iter(run.data.training[0].values())).shape[1]
    judges = {
        text: batches_of(
            run.model, windows_of(run.tokenizer, found.documents, length, judge_samples, recipe.seed)[: found.windows]
        )
        for text, found in documents.items()
    }
    needs: frozenset[str] = frozenset().union(*(metric_named(metric).NEEDS for metric in metrics))
    statistics = stages.collect_statistics(run, needs)
    results = []
    for metric in metrics:
        here = stages.in_metric(run, metric)
        student = stages.student_of(here, stages.decompose_all(here, statistics, metric), metric)
        for method in (m for m in methods if m.metric == metric):
            for rate, budget in budgets[metric].items():
                chosen = stages.allocate(here, student, metric, method.allocator, budget)
                kept = parameters(chosen.ranks, here.shapes)
                measured = {}
                for text, batches in judges.items():
                    masks = (part for item in chosen.masks.items() for part in item)
                    key = digest(run.identity, metric, *masks, *(t for b in batches for t in b.values()))
                    measured[text] = stages.cached_comparison(here, student, chosen, batches, key).to_dict()
                results.append(
                    {
                        "method": method.label,
                        "rate": rate,
                        **measured[texts[0]],
                        "texts": measured,
                        "kept_parameters": kept,
                        "budget": budget.parameters,
                        "effort": chosen.effort,
                        "history": chosen.history,
                        "ranks": chosen.ranks,
                        "kept": {n: here.shapes[n].parameters(r) / here.shapes[n].dense for n, r in chosen.ranks.items()},
                    }
                )
                logger.info("%s, rate %s: KL %.5f", method.label, rate, results[-1]["kl"])
                text = json.dumps(results, indent=1) + "\n"
                write_whole(output / RESULTS, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    return results
