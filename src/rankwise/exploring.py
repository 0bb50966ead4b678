"""`rankwise explore`: how far a model can be compressed, and with what, from one set of statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from torch import Tensor, nn

import rankwise
from rankwise import bundled, distributed, few_bits, stages, starting
from rankwise.allocation.llrc import LLRCQuick
from rankwise.allocation.mixed import Mixed
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.moments import Collected
from rankwise.calibration.text import refuse_unused
from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.estimate import Clock, Estimate
from rankwise.evaluation.frontier import answers
from rankwise.evaluation.protocols import own_source, read_judging_text
from rankwise.evaluation.size import Size
from rankwise.footprint import shortage
from rankwise.integration.checkpoint import refuse_taken
from rankwise.layers.matrices import Shape, stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.layers.quantised import BYTE, WIDTHS
from rankwise.masks.layers import Masks, is_whole
from rankwise.masks.student import Student
from rankwise.memory import peak_memory
from rankwise.narrowing import narrowed_inside, neurons_left
from rankwise.options import ExploreOptions
from rankwise.plain import plain, to_json
from rankwise.progress import progress, say
from rankwise.recipe import ALL, FEWER, MIXED, Recipe
from rankwise.reporting.command import command_of
from rankwise.run_folder import RunFolder, write_whole
from rankwise.runtime.latency import Latency, decodes
from rankwise.starting import Run
from rankwise.targets import Target, bytes_in_bits, latency_of

logger = logging.getLogger(__name__)
EXPLORED = "explored.json"
RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
BITS = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5)
ORIGINAL, ALIKE, LOW_RANK = "original", "same bits everywhere", "low rank"
BITS_EACH, BOTH = "bits per matrix", "bits or a rank per matrix"
METRIC = Mixed.decomposition
MIXED_OPTIONS = {"tokens": 2**7}  # that each matrix is measured on: fewer than by default, for an overview
JUDGED, LEAST_JUDGED = 2**12, 8  # tokens of each text, and windows
HELD_OUT = "held-out calibration text"
PER_CENT = 0.01


@dataclass(frozen=True)
class Ground:
    """What all points share. asked: fields of every recipe. latency: None where nothing is decoded."""

    run: Run
    student: Student
    statistics: Collected
    judges: Mapping[str, Sequence[Batch]]
    asked: Mapping[str, Any]
    latency: Latency | None


@torch.inference_mode(False)
def explore(
    model: str | Path | None = None,
    *,
    text: str | Sequence[str] = (),
    calibration: str | None = None,
    rates: Sequence[float] = RATES,
    bits: Sequence[float] = BITS,
    judge_samples: int | None = None,
    output: str | Path = "explored",
    **options: Unpack[ExploreOptions],
) -> dict[str, Any]:
    """Measure a language model compressed by low rank, in few bits and by both, from one set of statistics,
    and write what was found to `output`/explored.json, of which `rankwise.report` makes a page.

    model: a folder or a name on the hub; None is the bundled model.
    text: held-out texts to judge on, of which the first is the headline; by default the part of the
        calibration text that neither statistics nor choices see.
    calibration: as of `compress`, a source by name.
    rates: fractions of parameters to remove by low rank and fewer neurons, those of `llrc:quick`, the default's first step.
    bits: of a number on average, from 2 to 8: at the size that so many take everywhere, bits, and bits or
        ranks, are chosen for every matrix.
    judge_samples: windows of each text, drawn at random; by default 4,096 tokens' worth, but 8 at least.
    options: as of `Recipe`; the effort is quick unless told. What `output` holds from an earlier run is not
        computed again.

    Returns what explored.json holds. points: one mapping each of `series`, `label`, the `curves` that it is
    on (bits alone are a choice of bits or ranks too), `bytes` of the weights, `share` of the original's, the
    fields of `Comparison` on the first text (`kl` in nats per token), `texts` with those on each, `speedup`
    of decoding after `optimize` as this machine's table predicts (in bits without a kernel that of dense weights), `command` that
    makes it (None where none does), and of low rank `neurons`: the last matrix of each MLP with fewer hidden neurons -> how many
    of how many, and `next_per_cent`: matrix -> nats per token that the next
    per cent of its parameters costs. answers: see `rankwise.evaluation.frontier.answers`.
    Raises `RankwiseError`, before any long work where that can be known.
    """
    if distributed.size() > 1:
        raise RankwiseError("explore runs in one process: run it without torchrun")
    texts = [text] if isinstance(text, str) else list(text)
    if model is None:
        model, calibration = bundled.MODEL, calibration or "stdlib:train"
    asked: dict[str, Any] = {"calibration": calibration or "self", "effort": "quick", **options}
    recipe = _refusing(asked, rates, bits)
    sources, reading = filter(None, map(own_source, texts)), (recipe.text_column, recipe.dataset_options)
    refuse_unused([recipe.calibration, *sources], *reading)
    documents = {name: read_judging_text(name, *reading) for name in texts}
    output = Path(output)
    refuse_taken(output, overwrite=True)
    held = recipe.model_copy(update={"neurons": FEWER if rates else ALL})
    short = shortage(model, recipe.calibration, held, [METRIC], trains=True)
    if short is not None:
        raise short.refusal("compress goes block by block, one point at a time")
    clock = Clock()

    def rehearse(run: Run) -> dict[str, list[Batch]]:
        for size in bits:
            Target(_in_bits(run, asked, size)).budget(run)
        length = next(iter(run.data.training[0].values())).shape[1]
        samples = max(LEAST_JUDGED, JUDGED // length) if judge_samples is None else judge_samples
        return stages.judging_batches(run, documents, samples, recipe.seed) or {HELD_OUT: run.data.measuring}

    folder = RunFolder(output / "run")
    run = starting.start(model, recipe.calibration, None, recipe, rates, folder, rehearse=rehearse)
    with stacked_on_failure(run.model, run.experts):
        judges = rehearse(run)
        latency = latency_of(run) if decodes(run.model) else None
        clock.lap("loading")
        with widened(run.model):
            judged = sum(tokens_in(batches) for batches in judges.values())
            clock.estimate = _estimate(run, _Reading(len(rates), len(bits), judged))
            say(str(clock.estimate))
            statistics = stages.collect_statistics(run, metric_named(METRIC).NEEDS)
            clock.lap("calibration")
            student = stages.student_of(run, stages.decompose_all(run, statistics, METRIC), METRIC)
            clock.lap("decomposition")
        ground = Ground(run, student, statistics, judges, asked, latency)
        points = [*_of_low_rank(ground, rates), *_in_few_bits(ground, bits)]
        points = [_original(ground, rates, points[0]), *points]
        clock.lap("points")
        found = plain(_found(ground, points, clock))
    write_whole(output / EXPLORED, lambda path: path.write_text(to_json(found, indent=1) + "\n") and None)
    return found


def _refusing(asked: Mapping[str, Any], rates: Sequence[float], bits: Sequence[float]) -> Recipe:
    """The recipe that all points share. Raises `RankwiseError` for what can be refused without the model."""
    for rate in rates:
        Recipe.of(**asked, rate=rate)
    if not rates and not bits:
        raise RankwiseError("there is nothing to explore: give rates or bits")
    for size in bits:
        if not min(WIDTHS) <= size <= max(WIDTHS):
            raise RankwiseError(f"bits={size} must lie between {min(WIDTHS)} and {max(WIDTHS)}")
    return Recipe.of(**asked)


def _in_bits(run: Run, asked: Mapping[str, Any], bits: float) -> Recipe:
    """What asks for bits that are chosen, at the size of that many everywhere."""
    size = bytes_in_bits(run.model, run.shapes, bits)
    return Recipe.of(**asked, neurons=ALL, target_bytes=size, bits=MIXED, options=MIXED_OPTIONS)


def _of_low_rank(ground: Ground, rates: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The neurons and ranks of the default's first step, and what the next per cent of each matrix would cost."""
    preset = {} if ground.asked["effort"] == "quick" else {"preset": "quick"}
    for rate in progress(rates, "measuring low rank"):
        recipe = Recipe.of(**ground.asked, **preset, neurons=FEWER, rate=rate)
        costs, budget = Target(recipe).budget(ground.run)
        with narrowed_inside(ground.run, ground.student, ground.statistics, METRIC, budget, costs) as (run, student):
            own = replace(ground, run=run, student=student)
            with student.widened():
                chosen = stages.allocate(run, student, METRIC, LLRCQuick(), budget)
            found = {"rate": rate, "next_per_cent": _next_per_cent(own, budget, chosen.masks)}
            found["neurons"] = neurons_left(run, ground.run.shapes)
            yield _point(own, [LOW_RANK], f"rate {rate:g}", chosen, {}, recipe) | found


def _next_per_cent(ground: Ground, budget: Budget, masks: Masks) -> dict[str, float]:
    """What a per cent of each matrix would cost at these masks, by the prices of this budget's plan."""
    run, student = ground.run, ground.student
    spectra = {name: d.spectrum for name, d in student.decompositions.items()}
    with student.widened():
        prices = LLRCQuick().prices(Problem(run.shapes, spectra, budget, student, levels=run.levels))
    return {name: price_of_next(shape, prices[name], masks[name]) for name, shape in run.shapes.items()}


def _in_few_bits(ground: Ground, bits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """At each size bits alone, bits or a rank for every matrix, which may be the same, and the same bits everywhere: where
    these are the size, or the best. The best one by the selection text has a command, and the same bits everywhere."""
    run, student, statistics = ground.run, ground.student, ground.statistics
    multiple, allocator = Recipe.of(**ground.asked).rank_multiple, Mixed(**MIXED_OPTIONS)
    offers = few_bits.offers_of(run, statistics, student.decompositions, METRIC, multiple) if bits else {}
    for size in progress(bits, "measuring bits and ranks"):
        recipe = _in_bits(run, ground.asked, size)
        _, budget = Target(recipe).budget(run)
        plans = few_bits.plans_in_bits(run, student, statistics, METRIC, allocator, budget, offers, recipe.form)
        best = min((chosen for chosen, _ in plans.values()), key=few_bits.kl_of_plan)
        curves = {few_bits.BITS_OR_RANKS: [BOTH], few_bits.BITS_ALONE: [BITS_EACH], few_bits.SAME_BITS: [ALIKE]}
        if few_bits.BITS_ALONE not in plans:
            curves[few_bits.BITS_OR_RANKS] = [BITS_EACH, BOTH]
        for what, (chosen, layers) in plans.items():
            width = float(max(chosen.bits[name] for name in run.shapes)) if what == few_bits.SAME_BITS else size
            if width == size or chosen is best:
                made_by = recipe if chosen is best else None
                if what == few_bits.SAME_BITS:
                    rounded = {} if width == BYTE else {"decomposition": METRIC}
                    made_by = Recipe.of(**ground.asked, **rounded, neurons=ALL, bits=int(width))
                yield _point(ground, curves[what], f"{width:g} bits", chosen, layers, made_by) | {"bits": size}


def _point(
    ground: Ground,
    curves: Sequence[str],
    label: str,
    chosen: Allocation,
    layers: Mapping[str, nn.Module],
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """What a plan takes and costs. layers: of the matrices in few bits. recipe: which makes it."""
    run = ground.run
    with ground.student.as_original():
        size = Size.of(run.model, run.shapes, chosen.ranks, chosen.bits).bytes["model"]
    with ground.student.widened():
        texts = stages.judged(run, replace(ground.student, shipped=layers), METRIC, chosen, ground.judges)
    first = next(iter(texts.values()))
    logger.info("%s, %s: KL %.5f in %d bytes", curves[0], label, first["kl"], size["compressed"])
    name = f"{Path(run.base).name}-{'same-' if curves[0] == ALIKE else ''}{label}".replace(" ", "-")
    return {
        "series": curves[0],
        "curves": curves,
        "label": label,
        "bytes": size["compressed"],
        "share": size["compressed"] / size["reference"],
        **first,
        "texts": texts,
        "low_rank": sum(rank is not None for rank in chosen.ranks.values()),
        "speedup": ground.latency.speedup(chosen.ranks, run.shapes, chosen.bits) if ground.latency else None,
        "command": recipe and command_of(run.base, recipe.model_dump(), name),
    }


def _original(ground: Ground, rates: Sequence[float], other: Mapping[str, Any]) -> dict[str, Any]:
    """The model as it is stored, of which each `other` point knows enough."""
    run, nothing = ground.run, dict.fromkeys(ground.run.shapes)
    texts = {name: _unchanged(row) for name, row in other["texts"].items()}
    point = {
        "series": ORIGINAL,
        "curves": [],
        "label": "as it is stored",
        "bytes": Size.of(run.model, run.shapes, nothing).bytes["model"]["reference"],
        "share": 1.0,
        **next(iter(texts.values())),
        "texts": texts,
        "low_rank": 0,
        "speedup": 1.0 if ground.latency else None,
        "command": None,
    }
    if rates:
        _, budget = Target(Recipe.of(**ground.asked, rate=min(rates))).budget(run)
        point["next_per_cent"] = _next_per_cent(ground, budget, nothing)
    return point


def _unchanged(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The original compared with itself."""
    same = {"kl": 0.0, "agreement": 1.0, "flips": 0.0, "perplexity_ratio": 1.0}
    same |= {"perplexity": comparison["reference_perplexity"]}
    same = {name: value for name, value in same.items() if comparison[name] is not None}
    own = comparison["intervals"].get("reference_perplexity")
    return {**comparison, **same, "intervals": {"perplexity": own, "reference_perplexity": own}}


def _found(ground: Ground, points: Sequence[Mapping[str, Any]], clock: Clock) -> dict[str, Any]:
    run, recipe = ground.run, Recipe.of(**ground.asked)
    notes = starting.notes_of(sum(shape.dense for shape in run.shapes.values()), run.model.num_parameters())
    if ground.latency is None:
        notes.append(f"no speed is predicted: {type(run.model).__name__} is no causal language model")
    return {
        "base_model": run.base,
        "text": next(iter(ground.judges)),
        "points": points,
        "answers": answers(points),
        "left_dense": run.left_dense,
        "notes": notes,
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "recipe": recipe.model_dump(include=set(ground.asked)),
        "versions": {module.__name__: module.__version__ for module in (rankwise, torch, transformers)},
    }


@dataclass(frozen=True)
class _Reading:
    """What choosing and measuring all points reads, for the estimate. judged: tokens of all judging texts."""

    rates: int
    sizes: int
    judged: int

    def reads(self, training: Sequence[Batch], selection: Sequence[Batch], matrices: int) -> tuple[float, float]:
        """Tokens forward and back."""
        quick = LLRCQuick().reads(training, selection, matrices)
        forward, back = ((1 + self.rates) * tokens for tokens in quick)  # the original's prices, and those at each rate
        forward += Mixed(**MIXED_OPTIONS).reads(training, selection, matrices)[0]
        forward += 3 * self.sizes * tokens_in(selection)
        return forward + (1 + self.rates + 3 * self.sizes) * self.judged, back


def _estimate(run: Run, reading: _Reading) -> Estimate:
    expected = Estimate.of(run, METRIC, reading, 0, [], WIDTHS if reading.sizes else (), reading.rates > 0).expected
    before = {name: expected[name] for name in ("calibration", "decomposition")}
    narrowing = expected.get("narrowing", 0.0) + reading.rates * expected["decomposition"]  # of what is narrower at each rate
    return Estimate(before | {"points": narrowing + expected["allocation"]}, {})


def price_of_next(shape: Shape, prices: Tensor, mask: Tensor | None) -> float:
    """Nats per token that a per cent of the parameters which a matrix has now would cost, the cheapest
    components dropped first. prices: [k] of each component; mask: [k], which are kept, None for all."""
    kept = prices if mask is None or is_whole(mask) else prices[mask.bool()]
    held = shape.parameters(None if len(kept) == len(prices) else len(kept))
    fewer = min(shape.rank_within(int((1 - PER_CENT) * held)), len(kept) - 1)
    freed = held - shape.parameters(fewer)
    return kept.clamp_min(0).sort().values[: len(kept) - fewer].sum().item() * PER_CENT * held / freed
