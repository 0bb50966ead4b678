"""Narrower MLPs, a stage of a run before ranks are chosen: the model with the hidden neurons that stay, and its matrices
decomposed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from rankwise.allocation.allocator import Allocator
from rankwise.allocation.llrc import LLRC
from rankwise.allocation.plan import Budget, Shapes
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.moments import Collected, Moments
from rankwise.calibration.signal import frozen, signal_of
from rankwise.decomposition.metric import metric_named, orders_neurons
from rankwise.decomposition.slicing import sizes_of
from rankwise.errors import RankwiseError
from rankwise.layers.matrices import Shape
from rankwise.layers.neurons import Mlp, find_mlps
from rankwise.layers.precision import widened
from rankwise.masks.student import Layers, Student
from rankwise.run_folder import digest
from rankwise.slicing import Setting, chosen_neurons, narrow_layer, sizes_on_offer
from rankwise.stages import decompose_all, kept_in
from rankwise.starting import Run


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

    def student(self, run: Run, student: Student, statistics: Collected, metric: str, originals: Layers) -> Student:
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

    def student(self, run: Run, student: Student, statistics: Collected, metric: str, originals: Layers) -> Student:
        shapes = {name: run.shapes[name] for name in originals}
        with widened(run.model):
            again = decompose_all(replace(run, shapes=shapes), statistics, metric)
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
    setting = Setting(run, student, statistics, metric, budget, costs)
    with student.exactly():
        mlps = {mlp.down: mlp for mlp in mlps_of(run, budget, place)}
        if sizes:
            kept = {down: sizes_on_offer(setting, mlps[down]).kept(sizes[down]) for down in sizes if down in mlps}
        elif mlps:
            kept, levels = chosen_neurons(setting, mlps.values())
            run = replace(run, levels=levels)
        else:
            kept = {}
    if not kept:
        return run, student
    identity = digest(run.identity, *kept.items())
    mlp_of = {name: mlps[down] for down in kept for name in mlps[down].matrices}
    originals: dict[str, nn.Module] = {}
    for down, neurons in kept.items():
        with place.at(down):
            layers = {name: narrow_layer(setting, mlps[down], name, neurons) for name in mlps[down].matrices}
            originals |= {name: place.put(name, layer, identity) for name, layer in layers.items()}
    shapes = {name: Shape.of(run.model.get_submodule(name), shape.form) for name, shape in run.shapes.items()}
    parts = {name: mlp.parts if name != mlp.down else 1 for name, mlp in mlp_of.items()}
    narrow = replace(run, shapes=shapes, identity=identity, narrow=parts)
    of_the_kept = _OfTheKept(statistics, mlp_of, kept)
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


def neurons_left(run: Run, before: Shapes) -> dict[str, list[int]]:
    """How many hidden neurons are left of how many, by the last matrix of each MLP that has fewer. before: the shapes as they
    were."""
    sides = {name: [run.shapes[name].in_features, before[name].in_features] for name in run.narrow}
    return {name: [left, whole] for name, (left, whole) in sides.items() if left < whole}


def by_default(allocator: Allocator, metric: str) -> bool:
    """Whether MLPs may lose neurons where nothing is said."""
    return isinstance(allocator, LLRC) and orders_neurons(metric_named(metric))


def refuse_metric(metric: str) -> None:
    """Raises `RankwiseError` where neurons cannot be put in order in that metric."""
    if not orders_neurons(metric_named(metric)):
        raise RankwiseError(f"fewer neurons need kronecker or whitened, not {metric}: remove decomposition")


def refuse_other(run: Run, sizes: Mapping[str, int], place: Place | None = None) -> None:
    """Raises `RankwiseError` where `sizes` are not of MLPs of the model, or not fewer neurons than those have."""
    mlps = {mlp.down: mlp for mlp in mlps_of(run, Budget(0), place or _InMemory(run))} if sizes else {}
    for down, size in sizes.items():
        if down not in mlps:
            raise RankwiseError(
                f"the plan has neurons for {down}, which is the last matrix of none of the "
                f"{len(mlps)} MLPs of the model: remove the entry",
            )
        if size >= mlps[down].width:
            raise RankwiseError(
                f"the plan has {size} neurons for {down}, which has {mlps[down].width} in the "
                "model: give fewer, or remove the entry",
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


def narrowest(run: Run, budget: Budget, costs: Shapes) -> Shapes:
    """The matrices with as few neurons as their MLPs may have, in the budget's currency, as `costs` are."""
    with widened(run.model):
        mlps = mlps_of(run, budget, _InMemory(run))
    least = {mlp: min(sizes_of(mlp.width, budget.multiple), default=mlp.width) for mlp in mlps}
    return {**costs, **{name: mlp.shape(name, costs[name], size) for mlp, size in least.items() for name in mlp.matrices}}


@dataclass(frozen=True)
class _OfTheKept:
    """What was `collected` of the neurons that stay, made when it is asked for: all at once it would be as much again. kept: by
    the last matrix of each MLP."""

    collected: Collected
    mlp_of: Mapping[str, Mlp]
    kept: Mapping[str, Tensor]

    def of(self, matrix: str) -> Moments:
        mlp, moments = self.mlp_of[matrix], self.collected.of(matrix)
        kept = self.kept[mlp.down]
        rows = kept if matrix == mlp.down else mlp.rows(kept)

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            at = rows.to(value.device)
            return value[at][:, at] if value.ndim == 2 else value[at]

        names = ("input", "absolute", "total", "fisher") if matrix == mlp.down else ("output",)
        return replace(moments, **{name: part(getattr(moments, name)) for name in names})
