"""Decomposing a model block by block: the statistics of a site are collected, used and forgotten."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rankwise import distributed
from rankwise.calibration.moments import GRADIENTS, Moments, Statistics, find_sites, watching
from rankwise.calibration.signal import Signal, sampled_loss, with_draws
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.solver import decompose
from rankwise.errors import RankwiseError
from rankwise.integration.artifact import decomposition_key, decomposition_stage
from rankwise.layers.linear import weight_of
from rankwise.layers.precision import exact_device, is_finite
from rankwise.progress import progress
from rankwise.run_folder import RunFolder, read_tensors
from rankwise.stages import leave_unreached
from rankwise.starting import Run
from rankwise.streaming.activations import Activations
from rankwise.streaming.backward import back, forward, gradients_of, pieces_of
from rankwise.streaming.stream import Stream


@dataclass(frozen=True)
class Stored:
    """A decomposition in the run folder, each of its tensors read anew when asked for. The fields of `Decomposition`."""

    file: Path

    def _read(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    @property
    def second(self) -> Tensor:
        return self._read("second")

    @property
    def first(self) -> Tensor:
        return self._read("first")

    @property
    def spectrum(self) -> Tensor:
        return self._read("spectrum")

    @property
    def centre(self) -> None:
        return None

    def dropped(self, mask: Tensor) -> None:
        """No affine metric gets here."""


@dataclass(frozen=True)
class KeptMoments:
    """The moments of matrices that are kept in the run folder, each read when it is asked for."""

    run: Run
    metric: str
    device: torch.device

    def of(self, matrix: str) -> Moments:
        """As of `Statistics`."""
        found = read_tensors(self.run.folder.file(_moments_of(matrix), decomposition_key(self.run.identity, self.metric)))
        count = int(found.pop("count"))
        return Moments(count, **{name: tensor.to(exact_device(self.device), copy=True) for name, tensor in found.items()})


def decompose_all(stream: Stream, metric: str, kept: Collection[str] = ()) -> dict[str, Stored]:
    """Every matrix in the named metric, its statistics collected and forgotten block by block; kept: matrices whose moments are
    not forgotten."""
    run, needs = stream.run, metric_named(metric).NEEDS
    key = decomposition_key(run.identity, metric)

    def found(name: str) -> bool:
        stages = [decomposition_stage(metric, name), *([_moments_of(name)] if name in kept else [])]
        return all(_is_kept(run.folder, stage, key) for stage in stages)

    missing = distributed.of_the_first(lambda: [name for name in progress(run.shapes, "looking for results") if not found(name)])
    if missing:
        with stream.opened():
            (_backwards if GRADIENTS & needs else _forwards)(stream, metric, missing, kept)
        distributed.wait()  # for what the others have decomposed
    return stored_in(run, metric, run.shapes)


def stored_in(run: Run, metric: str, names: Iterable[str]) -> dict[str, Stored]:
    """What was decomposed of these matrices."""
    key = decomposition_key(run.identity, metric)
    return {name: Stored(run.folder.file(decomposition_stage(metric, name), key)) for name in names}


def _moments_of(name: str) -> str:
    return f"moments/{name}"


def _is_kept(folder: RunFolder, stage: str, key: str) -> bool:
    def missing() -> dict[str, Tensor]:
        raise KeyError(stage)

    try:
        folder.cached(stage, key, missing)
    except KeyError:
        return False
    return True


def _forwards(stream: Stream, metric: str, missing: Collection[str], kept: Collection[str]) -> None:
    """Decompose the missing matrices from the first block to the last that has one, moving the hidden states on."""
    blocks, needs = stream.blocks, metric_named(metric).NEEDS
    hidden = stream.entered("training", stream.training) if needs else None
    last = max(i for i in range(len(blocks)) if set(missing) & set(stream.matrices_of(i)))
    for index in progress(range(last + 1), "decomposing blocks"):
        with blocks.loaded(blocks.names(index)):
            wanted = [name for name in stream.matrices_of(index) if name in missing]
            if hidden is None:
                _decompose(
                    stream, metric, Statistics({name: name for name in wanted}, {name: Moments() for name in wanted}), kept
                )
                continue
            groups = _groups(stream, index, wanted, hidden, needs)
            for number, group in enumerate(groups):
                on = index < last and number == len(groups) - 1
                _decompose(stream, metric, _collect(stream, index, group, hidden, needs, on), kept)
            if not groups:
                _collect(stream, index, {}, hidden, needs, index < last)
    if hidden is not None:
        hidden.clear()


def _backwards(stream: Stream, metric: str, missing: Collection[str], kept: Collection[str]) -> None:
    """Decompose the missing matrices from the last block to the first that has one, taking the gradients of `sampled_loss`
    back."""
    blocks, run, needs = stream.blocks, stream.run, metric_named(metric).NEEDS
    pieces = pieces_of(with_draws(run.data.training, run.seed))

    def loss(window: Batch, signal: Signal) -> Tensor:
        if not is_finite(signal.values):
            raise RankwiseError(
                "the model's outputs on the calibration text are not finite: load it as float32",
            )
        return sampled_loss(signal, window)

    states = forward(stream, "training", pieces)
    gradients = gradients_of(stream, states[-1], pieces, loss)
    first = min(i for i in range(len(blocks)) if set(missing) & set(stream.matrices_of(i)))
    for index in progress(range(first, len(blocks))[::-1], "decomposing blocks"):
        with blocks.loaded(blocks.names(index)):
            wanted = [name for name in stream.matrices_of(index) if name in missing]
            groups = _groups(stream, index, wanted, states[index], needs)
            for number, group in enumerate(groups):
                on = index > first and number == len(groups) - 1
                with watching(run.model, group, needs) as watched:
                    back(stream, index, states[index], gradients, pieces, on, watched.expect)
                _decompose(stream, metric, watched.everyones(blocks.device), kept)
            if not groups:
                back(stream, index, states[index], gradients, pieces, hand_on=True)
    for hidden in (*states, gradients):
        hidden.clear()


def _decompose(stream: Stream, metric: str, statistics: Statistics, kept: Collection[str]) -> None:
    """Decompose the matrices of the statistics, all of a loaded block, each process its part, and keep their factors, and the
    moments of those that are `kept`."""
    run, needs = stream.run, metric_named(metric).NEEDS
    if needs:
        leave_unreached(run, statistics, needs)
    for name in distributed.dealt([name for name in statistics.site_of if name in run.shapes]):
        moments = statistics.of(name)
        decompose_one(run, metric, name, moments)
        if name in kept:
            sums = {kind: torch.as_tensor(value) for kind, value in vars(moments).items() if value is not None}
            run.folder.cached(_moments_of(name), decomposition_key(run.identity, metric), sums.copy)


def decompose_one(run: Run, metric: str, name: str, moments: Moments) -> None:
    """Decompose a matrix that has its weight in the model, and keep its factors."""
    chosen, weight = metric_named(metric), weight_of(run.model.get_submodule(name))

    def compute() -> dict[str, Tensor]:
        d = decompose(weight, *chosen.roots(moments)).to(dtype=weight.dtype)
        return {"second": d.second, "first": d.first, "spectrum": d.spectrum}

    try:
        run.folder.cached(decomposition_stage(metric, name), decomposition_key(run.identity, metric), compute)
    except RankwiseError as error:
        raise RankwiseError(f"{name}: {error}") from None


def _groups(
    stream: Stream, index: int, wanted: Sequence[str], hidden: Activations, needs: frozenset[str]
) -> list[dict[str, str]]:
    """The wanted matrices and their sites, in groups whose moments have room together: those of the first process."""
    if not wanted:
        return []
    return distributed.of_the_first(lambda: _own_groups(stream, index, wanted, hidden, needs))


def _own_groups(
    stream: Stream, index: int, wanted: Sequence[str], hidden: Activations, needs: frozenset[str]
) -> list[dict[str, str]]:
    probe = {name: tensor[:1] for name, tensor in stream.training[0].items()}
    call = stream.blocks.call_of(index, probe)
    site_of = find_sites(stream.run.model, wanted, lambda: stream.blocks.run(index, stream.blocks.sequence(hidden[0], 0), call))
    groups: list[dict[str, str]] = []  # matrix -> the first matrix of its site in the group
    left = 0
    for name in sorted(wanted, key=lambda name: wanted.index(site_of[name])):
        shape = stream.run.shapes[name]
        own = 4 * shape.out_features**2 if "output" in needs else 0
        same = next((other for other in groups[-1] if site_of[other] == site_of[name]), None) if groups else None
        size = own + (8 * shape.in_features**2 if same is None else 0)
        if not groups or size > left:
            groups.append({})
            left, same, size = stream.share.statistics, None, own + 8 * shape.in_features**2
        groups[-1][name] = same or name
        left -= size
    return groups


def _collect(
    stream: Stream, index: int, site_of: Mapping[str, str], hidden: Activations, needs: frozenset[str], forward: bool
) -> Statistics:
    """The moments of these sites of a loaded block over the training text."""
    with watching(stream.run.model, site_of, needs) as watched:
        for number, batch in enumerate(stream.training):
            watched.expect(batch)
            output = stream.blocks.run(index, hidden[number], stream.blocks.call_of(index, batch))
            if not is_finite(output):
                raise RankwiseError(
                    "the model's outputs on the calibration text are not finite: load it as float32",
                )
            if forward:
                hidden[number] = output
    return watched.everyones(stream.blocks.device)
