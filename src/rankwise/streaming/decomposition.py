"""Decomposing a model block by block: the statistics of a site are collected, used and forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from rankwise.calibration.moments import Moments, Statistics, find_sites, watching
from rankwise.calibration.signal import token_mask
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.solver import decompose
from rankwise.errors import RankwiseError
from rankwise.integration.artifact import decomposition_key, decomposition_stage
from rankwise.layers.linear import weight_of
from rankwise.progress import progress
from rankwise.run_folder import RunFolder
from rankwise.streaming.activations import Activations, finite
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

    def dropped(self, mask: Tensor) -> None:
        """No affine metric gets here."""


def decompose_all(stream: Stream, metric: str) -> dict[str, Stored]:
    """Every matrix in the named metric, its statistics collected and forgotten block by block."""
    run, needs = stream.run, metric_named(metric).NEEDS
    key = decomposition_key(run.identity, metric)
    missing = {name for name in progress(run.shapes, "looking for results") if not _is_kept(run.folder, metric, name, key)}
    last = max((i for i in range(len(stream.blocks)) if missing & set(stream.matrices_of(i))), default=-1)
    if last >= 0:
        with stream.opened():
            hidden = stream.entered("training", run.data.training) if needs else None
            for index in progress(range(last + 1), "decomposing blocks"):
                with stream.blocks.loaded(stream.blocks.names(index)):
                    wanted = [name for name in stream.matrices_of(index) if name in missing]
                    _decompose_block(stream, index, wanted, hidden, metric, key, forward=index < last)
            if hidden is not None:
                hidden.clear()
    assert run.folder.path is not None
    return {name: Stored(run.folder.path / f"{decomposition_stage(metric, name)}-{key}.safetensors") for name in run.shapes}


def _is_kept(folder: RunFolder, metric: str, name: str, key: str) -> bool:
    def missing() -> dict[str, Tensor]:
        raise KeyError(name)

    try:
        folder.cached(decomposition_stage(metric, name), key, missing)
    except KeyError:
        return False
    return True


def _decompose_block(
    stream: Stream, index: int, wanted: list[str], hidden: Activations | None, metric: str, key: str, forward: bool
) -> None:
    """Decompose the `wanted` matrices of a loaded block, as many sites at once as there is room for; with `forward`, move the
    hidden states on to the next block."""
    run, roots = stream.run, metric_named(metric).roots
    needs = metric_named(metric).NEEDS
    groups = _groups(stream, index, wanted, hidden) if hidden is not None else [{name: name for name in wanted}]
    for number, group in enumerate(groups):
        on = forward and number == len(groups) - 1
        if hidden is not None:
            statistics = _collect(stream, index, group, hidden, needs, on)
        else:
            statistics = Statistics(group, {name: Moments() for name in group})
        for name in group:
            moments = statistics.of(name)
            if needs and not moments.holds(needs):
                run.left_dense[name] = "the calibration text does not reach it"
                del run.shapes[name]
                continue
            weight = weight_of(run.model.get_submodule(name))

            def compute(moments: Moments = moments, weight: Tensor = weight) -> dict[str, Tensor]:
                d = decompose(weight, *roots(moments)).to(dtype=weight.dtype)
                return {"second": d.second, "first": d.first, "spectrum": d.spectrum}

            try:
                run.folder.cached(decomposition_stage(metric, name), key, compute)
            except RankwiseError as error:
                raise RankwiseError(f"{name}: {error}") from None
    if hidden is not None and forward and not groups:
        _collect(stream, index, {}, hidden, needs, True)


def _groups(stream: Stream, index: int, wanted: list[str], hidden: Activations) -> list[dict[str, str]]:
    """The wanted matrices and their sites, in groups whose moments have room together."""
    if not wanted:
        return []
    probe = {name: tensor[:1] for name, tensor in stream.run.data.training[0].items()}
    call = stream.blocks.call_of(index, probe)
    site_of = find_sites(stream.run.model, wanted, lambda: stream.blocks.run(index, hidden[0][:1], call))
    groups: list[dict[str, str]] = []
    left = 0
    for site in dict.fromkeys(site_of.values()):
        size = 8 * stream.run.shapes[site].in_features ** 2
        if not groups or size > left:
            groups.append({})
            left = stream.share.statistics
        groups[-1] |= {name: s for name, s in site_of.items() if s == site}
        left -= size
    return groups


def _collect(
    stream: Stream, index: int, site_of: Mapping[str, str], hidden: Activations, needs: frozenset[str], forward: bool
) -> Statistics:
    """The moments of these sites of a loaded block over the training text."""
    with watching(stream.run.model, site_of, needs) as watched:
        for number, batch in enumerate(stream.run.data.training):
            watched.mask = token_mask(batch)
            output = stream.blocks.run(index, hidden[number], stream.blocks.call_of(index, batch))
            if not finite(output):
                raise RankwiseError("the model's outputs on the calibration text are not finite")
            if forward:
                hidden[number] = output
    watched.statistics.refuse_not_finite()
    return watched.statistics
