"""Choosing bits or a rank for every matrix, and writing them: stages of a run, with their results in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankwise.allocation.allocator import Allocator
from rankwise.allocation.offer import Offer
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Allocation
from rankwise.calibration.moments import Collected
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.rounding import Rounding, low_rank_in_bits, roundings, tables_in_bits
from rankwise.decomposition.solver import Decomposition
from rankwise.integration.artifact import decomposition_key
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import PairLinear, layer_class
from rankwise.layers.precision import widened
from rankwise.layers.quantised import BYTE, WIDTHS, group_of, pack, unpack
from rankwise.layers.tables import tables_of
from rankwise.masks.layers import factorised, is_whole
from rankwise.masks.student import Student
from rankwise.progress import progress
from rankwise.run_folder import digest
from rankwise.stages import allocate
from rankwise.starting import Run

BITS_OR_RANKS, BITS_ALONE, SAME_BITS = "bits or ranks", "bits alone", "the same bits everywhere"


def offers_of(
    run: Run, statistics: Collected, decompositions: Mapping[str, Decomposition], metric: str, multiple: int
) -> dict[str, Offer]:
    """What every matrix may be written as in bytes, in the dtypes that the model is stored in."""

    def offer(name: str) -> Offer:
        errors = _roundings(run, statistics, metric, name)["errors"].tolist()
        rounding, dtype = dict(zip(WIDTHS, errors, strict=True)), weight_of(run.model.get_submodule(name)).dtype
        return Offer.of(run.shapes[name], decompositions[name].spectrum, rounding, dtype, multiple)

    return {name: offer(name) for name in progress(run.shapes, "rounding")}


def _roundings(run: Run, statistics: Collected, metric: str, name: str, widths: Sequence[int] = WIDTHS) -> dict[str, Tensor]:
    """The squared errors [widths] of a matrix in so many bits, and whole numbers, steps and unit of each, packed."""

    def compute() -> dict[str, Tensor]:
        weight = weight_of(run.model.get_submodule(name))
        found = roundings(weight, widths, metric_named(metric), statistics.of(name))
        tensors = {"errors": torch.tensor([error for _, error in found.values()], dtype=torch.float64)}
        for bits, (rounding, _) in found.items():
            tensors |= {f"codes.{bits}": pack(rounding.codes, bits), f"steps.{bits}": rounding.steps}
            if rounding.unit is not None:
                tensors[f"unit.{bits}"] = rounding.unit
        return tensors

    key = digest(decomposition_key(run.identity, metric), *((width, group_of(width)) for width in widths))
    return run.folder.cached(f"rounded/{metric}/{name}", key, compute)


def _rounding(run: Run, statistics: Collected, metric: str, name: str, bits: int, among: Sequence[int]) -> Rounding:
    """The matrix in so many bits; where it is kept, as it was found `among` others."""
    weight = weight_of(run.model.get_submodule(name))
    if run.folder.path is None:
        return roundings(weight, (bits,), metric_named(metric), statistics.of(name))[bits][0]
    saved = {part: tensor.to(weight.device) for part, tensor in _roundings(run, statistics, metric, name, among).items()}
    codes = unpack(saved[f"codes.{bits}"], bits, weight.shape[1])
    return Rounding(codes, saved[f"steps.{bits}"], saved.get(f"unit.{bits}"), bits)


def alike(run: Run, student: Student, statistics: Collected, metric: str, width: int) -> Allocation:
    """Every matrix in so many bits. The student has the layers from here on."""
    chosen = all_in(run, width)
    student.shipped = written_in_bits(run, statistics, {}, metric, chosen, PairLinear.form, among=(width,))
    return with_tables(chosen, student.shipped)


def all_in(run: Run, width: int) -> Allocation:
    """Every matrix dense, in so many bits."""
    nothing = dict.fromkeys(run.shapes)
    return Allocation(dict(nothing), dict(nothing), bits=dict.fromkeys(nothing, width))


def as_planned(
    run: Run,
    student: Student,
    statistics: Collected,
    metric: str,
    allocator: Allocator,
    budget: Budget,
    widths: Mapping[str, int],
    form: str,
) -> Allocation:
    """The ranks and bits of a plan. The student has the layers from here on."""
    chosen = allocate(run, student, metric, allocator, budget)
    chosen = replace(chosen, bits={name: widths[name] for name in run.shapes if name in widths})
    student.shipped = written_in_bits(run, statistics, student.decompositions, metric, chosen, form)
    return with_tables(chosen, student.shipped)


def choose_in_bits(
    run: Run, student: Student, statistics: Collected, metric: str, allocator: Allocator, budget: Budget, form: str
) -> Allocation:
    """The best one of a few plans by their KL on the selection text, as what each matrix costs alone does not tell
    which. The student has the layers in bits from here on."""
    offers = offers_of(run, statistics, student.decompositions, metric, budget.multiple)
    plans = plans_in_bits(run, student, statistics, metric, allocator, budget, offers, form).values()
    chosen, student.shipped = min(plans, key=lambda plan: kl_of_plan(plan[0]))
    return replace(chosen, history=[record for each, _ in plans for record in each.history])


def kl_of_plan(chosen: Allocation) -> float:
    """KL of a plan in bits on the selection text, nats per token."""
    return float(chosen.history[-1]["kl"])


def plans_in_bits(
    run: Run,
    student: Student,
    statistics: Collected,
    metric: str,
    allocator: Allocator,
    budget: Budget,
    offers: Mapping[str, Offer],
    form: str,
) -> dict[str, tuple[Allocation, Mapping[str, nn.Module]]]:
    """Plans by name, each with its layers: a rank or a number of bits for every matrix; where ranks are among them, bits
    alone; and the most bits that fit everywhere. budget: bytes."""

    def written(what: str, chosen: Allocation) -> tuple[Allocation, Mapping[str, nn.Module]]:
        layers = written_in_bits(run, statistics, student.decompositions, metric, chosen, form)
        judge, chosen = replace(student, shipped=layers), with_tables(chosen, layers)
        with widened(run.model):
            kl = judge.divergence(chosen.masks)
        return replace(chosen, history=[*chosen.history, {"step": what, "kl": kl}]), layers

    def plan(what: str, offered: Mapping[str, Offer]) -> tuple[Allocation, Mapping[str, nn.Module]]:
        with widened(run.model):
            chosen = allocate(run, student, metric, allocator, budget, offers=offered)
        return written(what, chosen)

    plans = {BITS_OR_RANKS: plan(BITS_OR_RANKS, offers)}
    if any(plans[BITS_OR_RANKS][0].ranks.values()):
        plans[BITS_ALONE] = plan(BITS_ALONE, {name: offer.of_bits() for name, offer in offers.items()})
    fitting = [
        w for w in WIDTHS if sum(offer.bytes[offer.ways.index((None, w))] for offer in offers.values()) <= budget.parameters
    ]
    if fitting:
        plans[SAME_BITS] = written(SAME_BITS, all_in(run, max(fitting)))
    return plans


def written_in_bits(
    run: Run,
    statistics: Collected,
    decompositions: Mapping[str, Decomposition],
    metric: str,
    chosen: Allocation,
    form: str,
    among: Sequence[int] = WIDTHS,
) -> dict[str, nn.Module]:
    """The layers of the matrices that are written in few bits, and of the vocabulary's tables. form: of those of low rank.
    among: the widths that each matrix is rounded to together, as they are kept together."""
    layers = tables_in_bits(tables_of(run.model, run.shapes))
    for name, bits in progress(chosen.bits.items(), "writing in few bits"):
        linear, mask = run.model.get_submodule(name), chosen.masks[name]
        if mask is None or is_whole(mask):
            layers[name] = _rounding(run, statistics, metric, name, bits, among).layer(bias_of(linear))
        else:
            cls = layer_class(form, *weight_of(linear).shape)
            layer = factorised(decompositions[name], mask, bias_of(linear), cls).to(weight_of(linear).dtype)
            layers[name] = low_rank_in_bits(layer, bits)
    return layers


def with_tables(chosen: Allocation, in_bits: Mapping[str, nn.Module]) -> Allocation:
    """The answer with the vocabulary's tables in it, of which it knows nothing."""
    tables = [name for name in in_bits if name not in chosen.bits]
    return replace(chosen, masks=chosen.masks | dict.fromkeys(tables), bits=chosen.bits | dict.fromkeys(tables, BYTE))
