"""Narrower MLPs, a stage of a run before ranks are chosen: how many hidden neurons each keeps beside low rank everywhere
else, and the model with those alone.

What a way of writing some matrices costs is predicted from its squared error in the metric's norm: KL = c error, where c hardly
depends on the error, but of an MLP on the block and on the family, ranks or neurons, so that it is measured once for each; of the
matrices beside MLPs it is much the same (`benchmarks/forms.py`). So an MLP's sizes and the ranks of its matrices are weighed on
one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

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
from rankwise.calibration.moments import Moments, Statistics
from rankwise.calibration.signal import frozen, signal_of
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.slicing import Slices, refit, slices_of
from rankwise.errors import RankwiseError
from rankwise.layers.blocks import block_lists, block_of
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import PairLinear
from rankwise.layers.matrices import Shape
from rankwise.layers.neurons import Mlp, find_mlps
from rankwise.layers.precision import widened
from rankwise.masks.student import Layers, Student
from rankwise.progress import progress
from rankwise.run_folder import digest
from rankwise.stages import Run, decompose_all, kept_in

POINT = 0.3  # of its parameters removed, where each family is measured
MEASURED, LEAST_MEASURED = 2**13, 2**7  # tokens through all groups together, and through each
OTHERS = 4  # groups beside MLPs that are measured
EXCHANGES = np.geomspace(1e-3, 1e3, 48)  # of error for parameters, relative to all of a group's


@dataclass(frozen=True)
class _Ground:
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


class Collected(Protocol):
    """What was collected of matrices."""

    def of(self, matrix: str) -> Moments:
        """The moments of a matrix."""
        ...


class Place(Protocol):
    """Where the model's weights are, and what is done with them there."""

    def at(self, name: str) -> AbstractContextManager[Callable[[], Tensor]]:
        """Inside, the matrix and those around it have their weights; with a function that gives an answer which they have a part
        in."""
        ...

    def put(self, name: str, layer: nn.Module, key: str) -> nn.Module:
        """Put the layer into the model, where `at` says that it has its weight; the one that was there. key: of the run with
        narrower MLPs."""
        ...

    def student(
        self, run: Run, student: Student, statistics: Callable[[str], Moments], metric: str, originals: Layers
    ) -> Student:
        """The student of the run with narrower MLPs. statistics: of the matrices in `originals`, which are decomposed again."""
        ...


@dataclass(frozen=True)
class _InMemory:
    """A model whose weights are all in memory."""

    run: Run

    @contextmanager
    def at(self, name: str) -> Iterator[Callable[[], Tensor]]:
        batch = first_tokens(self.run.data.training, 64)[0]
        with frozen(self.run.model):
            yield lambda: signal_of(self.run.model, batch).values

    def put(self, name: str, layer: nn.Module, key: str) -> nn.Module:
        before = self.run.model.get_submodule(name)
        self.run.model.set_submodule(name, layer)
        return before

    def student(
        self, run: Run, student: Student, statistics: Callable[[str], Moments], metric: str, originals: Layers
    ) -> Student:
        moments = {name: statistics(name) for name in originals}
        shapes = {name: run.shapes[name] for name in originals}
        with widened(run.model):
            again = decompose_all(replace(run, shapes=shapes), Statistics({n: n for n in moments}, moments, moments), metric)
        decompositions = {name: again.get(name) or student.decompositions[name] for name in run.shapes}
        return replace(student, decompositions=decompositions, kept=kept_in(run, metric), originals=originals)


def narrowed(
    run: Run,
    student: Student,
    statistics: Collected,
    metric: str,
    budget: Budget,
    costs: Shapes,
    sizes: Mapping[str, int] | None = None,
    place: Place | None = None,
) -> tuple[Run, Student]:
    """The run and its student with those MLPs narrower, in place, that are better so within the budget; or, by their last
    matrix, of the `sizes` given. costs: of the matrices, in the budget's currency. place: where the model is, in memory unless
    told. The student's teacher has the original's."""
    place = place or _InMemory(run)
    ground = _Ground(run, student, statistics, metric, budget, costs)
    with widened(run.model):
        mlps = {mlp.down: mlp for mlp in mlps_of(run, budget, place)}
        if sizes:
            kept = {down: _slices(ground, mlps[down]).kept(sizes[down]) for down in sizes if down in mlps}
        else:
            kept = _chosen(ground, mlps.values()) if mlps else {}
    if not kept:
        return run, student
    identity = digest(run.identity, *kept.items())
    mlp_of = {name: mlps[down] for down in kept for name in mlps[down].matrices}
    originals: dict[str, nn.Module] = {}
    for down, neurons in kept.items():
        with place.at(down):
            layers = {name: _narrow(ground, mlps[down], name, neurons) for name in mlps[down].matrices}
            originals |= {name: place.put(name, layer, identity) for name, layer in layers.items()}
    shapes = {name: Shape.of(run.model.get_submodule(name), shape.form) for name, shape in run.shapes.items()}
    parts = {name: mlp.parts if name != mlp.down else 1 for name, mlp in mlp_of.items()}
    narrow = replace(run, shapes=shapes, identity=identity, narrow=parts)

    def of_the_kept(name: str) -> Moments:
        return _of_the_kept(statistics.of(name), mlp_of[name], name, kept[mlp_of[name].down])

    return narrow, place.student(narrow, student, of_the_kept, metric, originals)


@contextmanager
def narrowed_inside(
    run: Run, student: Student, statistics: Collected, metric: str, budget: Budget, costs: Shapes
) -> Iterator[tuple[Run, Student]]:
    """As `narrowed`, with the model as it was on leaving."""
    narrow, learning = narrowed(run, student, statistics, metric, budget, costs)
    try:
        yield narrow, learning
    finally:
        put_back(run.model, learning.originals)


def put_back(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Undo `narrowed`."""
    for name, module in originals.items():
        model.set_submodule(name, module)


def refuse_other(run: Run, sizes: Mapping[str, int], place: Place | None = None) -> None:
    """Raises `RankwiseError` where `sizes` are not of MLPs of the model, or not fewer neurons than those have."""
    mlps = {mlp.down: mlp for mlp in mlps_of(run, Budget(0), place or _InMemory(run))} if sizes else {}
    for down, size in sizes.items():
        if down not in mlps:
            raise RankwiseError(f"the plan has neurons for {down}, which is the last matrix of none of the {len(mlps)} MLPs")
        if size >= mlps[down].width:
            raise RankwiseError(
                f"the plan has {size} neurons for {down}, which has {mlps[down].width}: take fewer, or none of it"
            )


@contextmanager
def whole_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever fails or is interrupted inside leaves the model's linear layers as they were."""
    before = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    try:
        yield
    except BaseException:
        for name, module in before.items():
            if model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        raise


def mlps_of(run: Run, budget: Budget, place: Place) -> list[Mlp]:
    """Those whose matrices are all to be chosen."""
    return find_mlps(run.model, [name for name in run.shapes if name not in budget.settled], place.at)


def _chosen(ground: _Ground, mlps: Collection[Mlp]) -> dict[str, Tensor]:
    """The neurons that stay, by the last matrix of each MLP that is better off with fewer."""
    run, budget, costs = ground.run, ground.budget, ground.costs

    def choose() -> dict[str, Tensor]:
        groups = _groups(ground, mlps)
        prices = _priced(ground, groups)
        within = budget.of_others(costs).parameters
        every = _solved(groups, prices, within)
        alone = _solved(
            [replace(group, ways=tuple(way for way in group.ways if way.size is None)) for group in groups],
            [price[[way.size is None for way in group.ways]] for group, price in zip(groups, prices, strict=True)],
            within,
        )
        kl = [ground.student.cost(_written(ground, groups, ways)) for ways in (every, alone)]
        if kl[0] >= kl[1] and sum(way.cost for way in alone) <= within:
            return {}
        return {
            group.mlp.down: group.slices.kept(way.size)
            for group, way in zip(groups, every, strict=True)
            if way.size is not None and group.mlp is not None and group.slices is not None
        }

    return run.folder.together("neurons", digest(run.identity, ground.metric, budget, *costs.items()), choose)


def _groups(ground: _Ground, mlps: Collection[Mlp]) -> list[_Group]:
    """Each MLP, the other matrices of each block, and every matrix outside of blocks by itself."""
    run, budget = ground.run, ground.budget
    if run.folder.path is not None and distributed.size() > 1:  # each process its part; the others read it
        for mlp in distributed.dealt(list(mlps)):
            _slices(ground, mlp)
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
        tails = {name: tail_of(ground.student.decompositions[name].spectrum) for name in names}
        ways = _low_rank({name: ground.costs[name] for name in names}, tails, budget.multiple)
        group = _Group(tuple(names), tuple(ways))
        groups.append(_with_sizes(ground, group, what, tails) if isinstance(what, Mlp) else group)
    return groups


def _with_sizes(ground: _Ground, group: _Group, mlp: Mlp, tails: Mapping[str, Floats]) -> _Group:
    """The group with the ways of narrower MLPs. What a rank misses of a part of a matrix is taken for what it misses of all."""
    slices = _slices(ground, mlp)
    ways = list(group.ways)
    for size, gone in zip(slices.sizes.tolist(), slices.errors.tolist(), strict=True):
        shapes = {name: mlp.shape(name, ground.costs[name], size) for name in mlp.matrices}
        ways += [replace(way, size=size, gone=gone) for way in _low_rank(shapes, tails, ground.budget.multiple)]
    return replace(group, ways=tuple(ways), mlp=mlp, slices=slices)


def _slices(ground: _Ground, mlp: Mlp) -> Slices:
    """The MLP's sizes, kept in the run folder."""
    run, metric, multiple = ground.run, ground.metric, ground.budget.multiple

    def compute() -> dict[str, Tensor]:
        moments = ground.statistics.of(mlp.down)
        left = metric_named(metric).roots(moments)[0]
        return vars(slices_of(ground.student.weight(mlp.down), left, _second(moments), multiple))

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


def _priced(ground: _Ground, groups: Sequence[_Group]) -> list[Floats]:
    """What each way of each group costs, nats per token; the same for every budget with the same matrices settled. Groups
    beside MLPs have the median c of a few of them."""
    run, budget = ground.run, ground.budget
    others = [group for group in groups if group.mlp is None]
    some = others[:: max(1, len(others) // OTHERS)]
    asked = [group for group in groups if group.mlp is not None] + some
    few = first_tokens(ground.student.selection, max(LEAST_MEASURED, MEASURED // len(asked)))

    def measure() -> dict[str, Tensor]:
        measured = progress(asked, "measuring MLPs and the rest")
        return {group.names[0]: torch.tensor(_factors(ground, group, few)) for group in measured}

    key = digest(run.identity, ground.metric, budget.multiple, budget.settled, *ground.costs.items())
    found = run.folder.together("neurons/measured", key, measure)
    usual = np.median([found[group.names[0]].numpy() for group in some] or np.zeros((1, 2)), axis=0)
    prices = []
    for group in groups:
        ranks, gone = found[group.names[0]].numpy() if group.mlp is not None else usual
        prices.append(np.array([ranks * way.error + gone * way.gone for way in group.ways]))
    return prices


def _factors(ground: _Ground, group: _Group, text: Sequence[Batch]) -> list[float]:
    """c of the group's ranks, and of its neurons: nats per token of an error."""
    left = (1 - POINT) * sum(ground.costs[name].dense for name in group.names)
    found = []
    for kind, other in (("error", "gone"), ("gone", "error")):
        alone = [way for way in group.ways if getattr(way, kind) > 0 and getattr(way, other) == 0]
        found.append(0.0)
        if alone:
            way = min(alone, key=lambda way: abs(way.cost - left))
            kl = ground.student.cost(_written(ground, [group], [way]), text)
            found[-1] = max(kl, LEAST) / getattr(way, kind)
    return found


def _solved(groups: Sequence[_Group], prices: Sequence[Floats], within: int) -> list[_Way]:
    costs = [np.array([way.cost for way in group.ways]) for group in groups]
    positions = solve(costs, prices, within, RELATIVE_GAP).tolist()
    return [group.ways[at] for group, at in zip(groups, positions, strict=True)]


def _written(ground: _Ground, groups: Sequence[_Group], ways: Sequence[_Way]) -> Layers:
    """The layers of the groups in these ways, dense ones left out."""
    way_of = {name: (group, way) for group, way in zip(groups, ways, strict=True) for name in group.names}
    changed = [name for name, (_, way) in way_of.items() if way.size is not None or way.ranks[name] is not None]
    return ground.student.layers_of(changed, lambda name: _layer(ground, *way_of[name], name))


def _layer(ground: _Ground, group: _Group, way: _Way, name: str) -> nn.Module:
    """One of these."""
    rank, mlp, kept = way.ranks[name], group.mlp, None
    if mlp is not None and group.slices is not None and way.size is not None:
        kept = group.slices.kept(way.size)
        if rank is None:
            return _narrow(ground, mlp, name, kept)
    found, bias = ground.student.decompositions[name], bias_of(ground.run.model.get_submodule(name))
    second, first = found.second[:, :rank], found.first[:rank]
    if mlp is not None and kept is not None:
        if name == mlp.down:
            first = refit(first, _second(ground.statistics.of(name)), kept).to(first)
        else:
            rows = mlp.rows(kept).to(second.device)
            second, bias = second[rows], None if bias is None else bias[rows.to(bias.device)]
    return PairLinear.from_factors(second, first, bias)


def _narrow(ground: _Ground, mlp: Mlp, name: str, kept: Tensor) -> nn.Module:
    """The MLP's layer of that name with these neurons, the last one refitted."""
    model = ground.run.model
    weight = weight_of(model.get_submodule(name))
    if name != mlp.down:
        return mlp.inner_layer(model, name, kept.to(weight.device))
    return mlp.last_layer(model, refit(weight, _second(ground.statistics.of(name)), kept))


def _second(moments: Moments) -> Tensor:
    """The damped second moment [n, n] of a matrix's inputs."""
    root = input_root(moments)
    assert root.full is not None
    return root.full / root.count + torch.diag(root.scale.square())


def _of_the_kept(moments: Moments, mlp: Mlp, name: str, kept: Tensor) -> Moments:
    """What was collected of the neurons that stay."""
    rows = kept if name == mlp.down else mlp.rows(kept)

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        at = rows.to(value.device)
        return value[at][:, at] if value.ndim == 2 else value[at]

    names = ("input", "absolute", "total", "fisher") if name == mlp.down else ("output",)
    return replace(moments, **{name: part(getattr(moments, name)) for name in names})
