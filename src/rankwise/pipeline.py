"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled
from rankwise.allocation.allocator import Allocator, allocator_named
from rankwise.allocation.plan import Budget, Ranks
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.data import Data
from rankwise.calibration.moments import Moments, Statistics, collect
from rankwise.calibration.signal import device_of, frozen, values_of
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import Batch, default_length, default_samples, sampled_windows, windows_of
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.solver import Decomposition, decompose
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import Comparison, compare
from rankwise.evaluation.size import Size
from rankwise.integration.checkpoint import (
    load_config,
    load_model,
    load_tokenizer,
    refuse_compressed,
    refuse_not_finite,
    refuse_taken,
)
from rankwise.integration.quantizer import RankwiseConfig, attach
from rankwise.integration.result import write_result
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.matrices import Shape, find_matrices, unstack_experts
from rankwise.masks.student import Student, factorised
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder, digest, fingerprint

logger = logging.getLogger(__name__)

Calibration = str | Path | Sequence[str] | Tensor | Sequence[Batch]


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
    metric = metric_named(str(recipe.decomposition))
    run = RunFolder()
    if output is not None:
        refuse_taken(Path(output), overwrite)
        run = RunFolder.beside(Path(output), resume, overwrite)

    clock = _Clock()
    if isinstance(calibration, str | Path) and calibration != "self":
        calibration = read_documents(str(calibration), recipe.text_column, recipe.dataset_options)
    dense, tokenizer, base = _open(model, recipe, tokenizer)
    experts = unstack_experts(dense)
    shapes, left_dense = find_matrices(dense, recipe.include, recipe.exclude, recipe.rank_multiple)
    budget = Budget.of(shapes, recipe.rate, recipe.scope, dense.num_parameters(), recipe.rank_multiple)
    identity = fingerprint(dense)
    data = _data(dense, calibration, tokenizer, recipe, run, identity)
    clock.lap("loading")

    identity = digest(identity, *data.tensors, recipe.seed)
    statistics = _statistics(dense, shapes, data, metric.NEEDS, recipe.seed, run, identity)
    for name in [n for n in shapes if metric.NEEDS and statistics.of(n).count == 0]:
        left_dense[name] = "the calibration text does not reach it"
        del shapes[name]
    clock.lap("calibration")

    roots = {name: lambda name=name: metric.roots(statistics.of(name)) for name in shapes}
    key = digest(identity, recipe.decomposition)
    decompositions = {
        name: _decomposition(dense, name, roots[name], run, key) for name in tqdm(shapes, desc="decomposing")
    }
    clock.lap("decomposition")

    student = Student(dense, decompositions, data.training, data.selection, recipe.seed)
    problem = Problem(shapes, {name: d.spectrum for name, d in decompositions.items()}, budget, student)
    chosen = _allocation(allocator, problem, run, digest(key, allocator, budget))
    clock.lap("allocation")

    comparison = _measure(student, chosen, data)
    clock.lap("measuring")

    size = _size(dense, shapes, chosen.ranks)
    attach(dense, _factorise(student, chosen, experts))
    report = _report(recipe, base, size, comparison, chosen, left_dense, data, clock)
    result = Compressed(dense, chosen.ranks, report, recipe, tokenizer)
    if output is not None:
        result.save(output, overwrite)
        run.remove()
    return result


def _recipe(
    rate: float, calibration: Calibration, allocation: str | Allocator, options: dict[str, Any]
) -> tuple[Recipe, Allocator]:
    """The recipe with the decomposition settled, and its allocator."""
    source = str(calibration) if isinstance(calibration, str | Path) else "given in memory"
    name = allocation if isinstance(allocation, str) else type(allocation).__name__
    recipe = Recipe.of(rate=rate, calibration=source, allocation=name, **options)
    if isinstance(allocation, str):
        allocation = allocator_named(recipe.allocation, recipe.preset, recipe.options)
    return recipe.model_copy(update={"decomposition": recipe.decomposition or allocation.decomposition}), allocation


def _open(
    model: str | Path | PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """The dense model, its tokenizer where there is one, and its name."""
    if isinstance(model, PreTrainedModel):
        base = getattr(model.config, "_name_or_path", "") or type(model).__name__
        refuse_compressed(base, model.config)
        refuse_not_finite(model)
        return model, tokenizer, base
    config = load_config(model)
    refuse_compressed(model, config)
    base = "the bundled model" if model == bundled.MODEL else str(model)
    return load_model(model, config, recipe.dtype, recipe.device), tokenizer or load_tokenizer(model), base


def _data(
    model: PreTrainedModel,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    run: RunFolder,
    identity: str,
) -> Data:
    length = recipe.length or default_length(model)
    samples = recipe.samples or default_samples(length)
    if isinstance(calibration, Tensor):
        return Data.of_windows(model, calibration)
    if calibration == "self":
        key = digest(identity, length, samples, recipe.seed)
        with frozen(model):
            written = run.cached(
                "text", key, lambda: {"windows": sampled_windows(model, length, samples, recipe.seed)}
            )
        return Data.of_windows(model, written["windows"])
    if isinstance(calibration[0], str):
        if tokenizer is None:
            raise RankwiseError("the model has no tokenizer for the calibration text: give one, or windows of tokens")
        windows = windows_of(tokenizer, calibration, length, samples, recipe.seed)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if windows.max() >= vocabulary:
            raise RankwiseError(
                f"the tokenizer gives the token {windows.max()}, but the model has only {vocabulary}: is it the model's own?"
            )
        return Data.of_windows(model, windows)
    return Data.of_batches(calibration)


def _statistics(
    model: PreTrainedModel,
    shapes: dict[str, Shape],
    data: Data,
    needs: frozenset[str],
    seed: int,
    run: RunFolder,
    identity: str,
) -> Statistics:
    """Collected, or read from the run folder."""
    if not needs:
        return Statistics({name: name for name in shapes}, {name: Moments() for name in shapes})
    key = digest(identity, *shapes, *sorted(needs))
    saved = run.cached("statistics", key, lambda: collect(model, shapes, data.training, needs, seed).to_tensors())
    return Statistics.from_tensors(saved, device_of(model))


def _decomposition(model: PreTrainedModel, name: str, roots: Any, run: RunFolder, key: str) -> Decomposition:
    """Computed in float64 or read from the run folder; the factors in the model's dtype, on its device."""
    weight = weight_of(model.get_submodule(name))
    try:
        saved = run.cached(f"decomposition/{name}", key, lambda: vars(decompose(weight, *roots()).to(dtype=weight.dtype)))
    except RankwiseError as error:
        raise RankwiseError(f"{name}: {error}") from None
    return Decomposition(**saved).to(weight.device)


def _allocation(allocator: Allocator, problem: Problem, run: RunFolder, key: str) -> Allocation:
    """Chosen, or read from the run folder; never above the budget."""

    def choose() -> dict[str, Tensor]:
        chosen = allocator.allocate(problem)
        history = torch.tensor(list(json.dumps(chosen.history).encode()), dtype=torch.uint8)
        return {"__history__": history} | {name: mask for name, mask in chosen.masks.items() if mask is not None}

    saved = run.cached("allocation", key, choose)
    masks = {name: saved.get(name) for name in problem.shapes}
    ranks = {name: None if mask is None else int(mask.count_nonzero()) for name, mask in masks.items()}
    return Allocation(ranks, masks, json.loads(bytes(saved["__history__"].tolist())))


def _measure(student: Student, chosen: Allocation, data: Data) -> Comparison:
    """On text that neither statistics nor masks have seen."""
    model = student.model
    assert isinstance(model, PreTrainedModel)

    def compressed(batch: Batch) -> Tensor:
        with student.with_masks(chosen.masks):
            return values_of(model, batch)[0]

    with frozen(model):
        return compare(lambda batch: values_of(model, batch)[0], compressed, data.measuring, model.can_generate())


def _size(model: PreTrainedModel, shapes: dict[str, Shape], ranks: Ranks) -> Size:
    element = weight_of(model.get_submodule(next(iter(shapes)))).element_size()
    return Size.of(shapes, ranks, model.num_parameters(), sum(p.nbytes for p in model.parameters()), element)


def _factorise(student: Student, chosen: Allocation, experts: list[str]) -> RankwiseConfig:
    """Put the low-rank layers into the model for good."""
    for name, mask in chosen.masks.items():
        if mask is not None:
            bias = bias_of(student.model.get_submodule(name))
            student.model.set_submodule(name, factorised(student.decompositions[name], mask, bias))
    return RankwiseConfig(ranks={n: r for n, r in chosen.ranks.items() if r is not None}, experts=experts)


def _report(
    recipe: Recipe,
    base: str,
    size: Size,
    comparison: Comparison,
    chosen: Allocation,
    left_dense: dict[str, str],
    data: Data,
    clock: _Clock,
) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "base_model": base,
        "rate": recipe.rate,
        "scope": recipe.scope,
        **size.to_dict(),
        **comparison.to_dict(),
        "ranks": chosen.ranks,
        "left_dense": left_dense,
        "history": chosen.history,
        "seconds": clock.seconds,
        "recipe": recipe.model_dump(),
    }
