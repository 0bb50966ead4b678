"""How many hidden neurons each MLP keeps, beside low rank everywhere else.

What a way of writing some matrices costs is predicted from its squared error in the metric's norm: KL = c error, where c hardly
depends on the error (`benchmarks/forms.py`), and little on the block, but on the family, ranks or neurons: it is measured once
for each in every third block. So an MLP's sizes and the ranks of its matrices are weighed on one scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.allocation.kl_knapsack import LEAST
from rankwise.allocation.mixed import RELATIVE_GAP
from rankwise.allocation.multiple_choice import Floats, solve
from rankwise.allocation.offer import tail_of
from rankwise.allocation.plan import Budget, Ranks, Shapes, options
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.moments import Collected
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.slicing import Slices, refit, slices_of
from rankwise.layers.blocks import block_lists, block_of
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import PairLinear
from rankwise.layers.matrices import Shape
from rankwise.layers.neurons import Mlp
from rankwise.masks.student import Layers, Student
from rankwise.memory import give_back
from rankwise.progress import progress
from rankwise.run_folder import as_notes, digest, notes_in
from rankwise.starting import Run

POINT = 0.3  # of its parameters removed, where each family is measured
EVERY = 3  # every third group of a kind is measured, and the first and last two, the only ones where c differs much
MEASURED, LEAST_MEASURED = 2**12, 2**7  # tokens through all groups together, and through each that is measured
COMPARED = 2**10  # through the model with fewer neurons, and through the one without
EXCHANGES = np.geomspace(1e-3, 1e3, 48)  # of error for parameters, relative to all of a group's


@dataclass(frozen=True)
class Setting:
    """What all groups share. costs: of the matrices, in the budget's currency."""

    run: Run
    student: Student
    statistics: Collected
    metric: str
    budget: Budget
    costs: Shapes


@dataclass(frozen=True)
class _Way:
    """One way of writing a group of matrices: its cost, their ranks, of an MLP how many neurons stay (None for all), and the
    squared errors of the ranks and of the neurons that are gone."""

    cost: int
    ranks: Ranks
    error: float
    size: int | None = None
    gone: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Matrices that are weighed as one, and the ways of writing them; mlp and slices: where they can be narrower."""

    names: tuple[str, ...]
    ways: tuple[_Way, ...]
    mlp: Mlp | None = None
    slices: Slices | None = None


def chosen_neurons(setting: Setting, mlps: Collection[Mlp]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The neurons that stay, by the last matrix of each MLP that is better off with fewer; and for each matrix what a squared
    error of its rank costs, nats per token."""
    run, budget, costs = setting.run, setting.budget, setting.costs

    def choose() -> dict[str, Tensor]:
        groups = _groups(setting, mlps)
        factors = _measured(setting, groups)
        prices = [_costs(group, *factor) for group, factor in zip(groups, factors, strict=True)]
        levels = {name: factor[0] for group, factor in zip(groups, factors, strict=True) for name in group.names}
        found = as_notes({"levels": levels})
        within = budget.of_others(costs).parameters
        every = _solved(groups, prices, within)
        alone = _solved(
            [replace(group, ways=tuple(way for way in group.ways if way.size is None)) for group in groups],
            [price[[way.size is None for way in group.ways]] for group, price in zip(groups, prices, strict=True)],
            within,
        )
        few = first_tokens(setting.student.selection, COMPARED)
        give_back()  # beside the statistics two whole plans are written next
        kl = [setting.student.cost(_written(setting, groups, ways), few) for ways in (every, alone)]
        if kl[0] >= kl[1] and sum(way.cost for way in alone) <= within:
            return found
        return found | {
            group.mlp.down: group.slices.kept(way.size)
            for group, way in zip(groups, every, strict=True)
            if way.size is not None and group.mlp is not None and group.slices is not None
        }

    saved = run.folder.together("neurons/chosen", digest(run.identity, setting.metric, budget, *costs.items()), choose)
    give_back()
    levels: dict[str, float] = notes_in(saved)["levels"]
    return {down: kept for down, kept in saved.items() if down in run.shapes}, levels


def _groups(setting: Setting, mlps: Collection[Mlp]) -> list[_Group]:
    """Each MLP, the other matrices of each block, and every matrix outside of blocks by itself."""
    run, budget = setting.run, setting.budget
    if run.folder.path is not None and distributed.size() > 1:  # each process its part; the others read it
        for mlp in distributed.dealt(list(mlps)):
            sizes_on_offer(setting, mlp)
        distributed.wait()
    mlp_of = {name: mlp for mlp in mlps for name in mlp.matrices}
    together: dict[Any, list[str]] = {}
    paths = block_lists(run.model, run.shapes)
    for name in run.shapes:
        if name not in budget.settled:
            places = [(path, number) for path in paths if (number := block_of(name, path)) is not None]
            together.setdefault(mlp_of.get(name) or (places[0] if places else name), []).append(name)
    groups = []
    for what, names in progress(together.items(), "ordering hidden neurons"):
        tails = {name: tail_of(setting.student.decompositions[name].spectrum) for name in names}
        ways = _low_rank({name: setting.costs[name] for name in names}, tails, budget.multiple)
        group = _Group(tuple(names), tuple(ways))
        groups.append(_with_sizes(setting, group, what, tails) if isinstance(what, Mlp) else group)
    return groups


def _with_sizes(setting: Setting, group: _Group, mlp: Mlp, tails: Mapping[str, Floats]) -> _Group:
    """The group with the ways of narrower MLPs. What a rank misses of a part of a matrix is taken for what it misses of all."""
    slices = sizes_on_offer(setting, mlp)
    ways = list(group.ways)
    for size, gone in zip(slices.sizes.tolist(), slices.errors.tolist(), strict=True):
        shapes = {name: mlp.shape(name, setting.costs[name], size) for name in mlp.matrices}
        ways += [replace(way, size=size, gone=gone) for way in _low_rank(shapes, tails, setting.budget.multiple)]
    return replace(group, ways=tuple(ways), mlp=mlp, slices=slices)


def sizes_on_offer(setting: Setting, mlp: Mlp) -> Slices:
    """The MLP's sizes, kept in the run folder."""
    run, metric, multiple = setting.run, setting.metric, setting.budget.multiple

    def compute() -> dict[str, Tensor]:
        moments = setting.statistics.of(mlp.down)
        left = metric_named(metric).roots(moments)[0]
        return vars(slices_of(setting.student.weight(mlp.down), left, input_root(moments).metric, multiple))

    return Slices(**run.folder.cached(f"neurons/{mlp.down}", digest(run.identity, metric, multiple), compute))


def _low_rank(shapes: Mapping[str, Shape], tails: Mapping[str, Floats], multiple: int) -> list[_Way]:
    """The ranks with the least error of all these matrices together, from the least cost to dense."""
    curves = []
    for name, shape in shapes.items():
        ranks = options(shape, multiple)
        at = np.array(ranks[:-1], dtype=np.int64)
        costs = np.append(shape.numbers(at) + shape.added, shape.dense)
        curves.append((name, ranks, costs, np.append(tails[name][at], 0.0)))
    whole = sum(errors.max() for *_, errors in curves) / sum(costs.max() for *_, costs, _ in curves)
    ways = {}
    for exchange in (*EXCHANGES * whole, 0.0):
        best = [(errors + exchange * costs).argmin() for *_, costs, errors in curves]
        cost = sum(int(costs[at]) for (*_, costs, _), at in zip(curves, best, strict=True))
        error = sum(float(errors[at]) for (*_, errors), at in zip(curves, best, strict=True))
        ways[cost] = _Way(cost, {name: ranks[at] for (name, ranks, *_), at in zip(curves, best, strict=True)}, error)
    return list(ways.values())


def _measured(setting: Setting, groups: Sequence[_Group]) -> list[list[float]]:
    """`_factors` of every group, the same for every budget with the same matrices settled: measured, or between those of the
    nearest of its kind."""
    run, budget = setting.run, setting.budget
    kinds: dict[Any, list[_Group]] = {}
    for group in groups:
        kinds.setdefault(tuple(re.sub(r"\d+", "", name) for name in group.names), []).append(group)
    asked = [alike[at] for alike in kinds.values() for at in _places(len(alike))]
    few = first_tokens(setting.student.selection, max(LEAST_MEASURED, MEASURED // len(asked)))

    def measure() -> dict[str, Tensor]:
        measured = progress(asked, "measuring MLPs and the rest")
        return {group.names[0]: torch.tensor(_factors(setting, group, few)) for group in measured}

    key = digest(run.identity, setting.metric, budget.multiple, budget.settled, *setting.costs.items())
    measured = run.folder.together("neurons/measured", key, measure)
    found: dict[str, list[float]] = {}
    for alike in kinds.values():
        of_some = np.stack([measured[alike[at].names[0]].numpy() for at in _places(len(alike))])
        of_all = np.stack([_between(_places(len(alike)), column, len(alike)) for column in of_some.T], 1)
        found |= {group.names[0]: factors for group, factors in zip(alike, of_all.tolist(), strict=True)}
    return [found[group.names[0]] for group in groups]


def _places(count: int) -> list[int]:
    """Which of so many groups of a kind are measured."""
    return [at for at in range(count) if at % EVERY == 0 or at < 2 or at >= count - 2]


def _between(places: Sequence[int], factors: Floats, count: int) -> Floats:
    """The factors [count] of all places, from those of some: geometrically between the nearest that are not 0."""
    known = np.flatnonzero(factors)
    if not len(known):
        return np.zeros(count)
    return np.exp(np.interp(np.arange(count), np.array(places)[known], np.log(factors[known])))


def _costs(group: _Group, of_ranks: float, of_neurons: float) -> Floats:
    """What each way of the group costs, nats per token."""
    return np.array([of_ranks * way.error + of_neurons * way.gone for way in group.ways])


def _factors(setting: Setting, group: _Group, text: Sequence[Batch]) -> list[float]:
    """c of the group's ranks, and of its neurons: nats per token of an error."""
    left = (1 - POINT) * sum(setting.costs[name].dense for name in group.names)
    found = []
    for kind, other in (("error", "gone"), ("gone", "error")):
        alone = [way for way in group.ways if getattr(way, kind) > 0 and getattr(way, other) == 0]
        found.append(0.0)
        if alone:
            way = min(alone, key=lambda way: abs(way.cost - left))
            kl = setting.student.cost(_written(setting, [group], [way]), text)
            found[-1] = max(kl, LEAST) / getattr(way, kind)
    return found


def _solved(groups: Sequence[_Group], prices: Sequence[Floats], within: int) -> list[_Way]:
    costs = [np.array([way.cost for way in group.ways]) for group in groups]
    positions = solve(costs, prices, within, RELATIVE_GAP).tolist()
    return [group.ways[at] for group, at in zip(groups, positions, strict=True)]


def _written(setting: Setting, groups: Sequence[_Group], ways: Sequence[_Way]) -> Layers:
    """The layers of the groups in these ways, dense ones left out."""
    way_of = {name: (group, way) for group, way in zip(groups, ways, strict=True) for name in group.names}
    changed = [name for name, (_, way) in way_of.items() if way.size is not None or way.ranks[name] is not None]
    return setting.student.layers_of(changed, lambda name: _layer(setting, *way_of[name], name))


def _layer(setting: Setting, group: _Group, way: _Way, name: str) -> nn.Module:
    """One of these."""
    rank, mlp, kept = way.ranks[name], group.mlp, None
    if mlp is not None and group.slices is not None and way.size is not None:
        kept = group.slices.kept(way.size)
        if rank is None:
            return narrow_layer(setting, mlp, name, kept)
    linear = setting.run.model.get_submodule(name)
    found, bias = setting.student.decompositions[name], bias_of(linear)
    second, first = (factor.to(weight_of(linear).dtype) for factor in (found.second[:, :rank], found.first[:rank]))
    if mlp is not None and kept is not None:
        if name == mlp.down:
            first = refit(first, input_root(setting.statistics.of(name)).metric, kept).to(first)
        else:
            rows = mlp.rows(kept).to(second.device)
            second, bias = second[rows], None if bias is None else bias[rows.to(bias.device)]
    return PairLinear.from_factors(second, first, bias)


def narrow_layer(setting: Setting, mlp: Mlp, name: str, kept: Tensor) -> nn.Module:
    """The MLP's layer of that name with these neurons, the last one refitted."""
    model = setting.run.model
    weight = weight_of(model.get_submodule(name))
    if name != mlp.down:
        return mlp.inner_layer(model, name, kept.to(weight.device))
    return mlp.last_layer(model, refit(weight, input_root(setting.statistics.of(name)).metric, kept))
