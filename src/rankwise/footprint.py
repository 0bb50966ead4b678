"""What a run in memory takes, known from the config alone, and whether as much is there.

Legend: m, n a matrix's outputs and inputs, d the hidden size, e the bytes of a number that the model computes in.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise import memory
from rankwise.calibration.batches import numbers_of_a_token, room_for_a_batch, sides
from rankwise.calibration.moments import GRADIENTS, find_sites
from rankwise.calibration.own_text import kept_of_a_token, written_at_once
from rankwise.calibration.signal import LOGITS_AT_ONCE, PROBE, device_of
from rankwise.calibration.tokens import TOKENS_PER_BATCH, vocabulary_of, windows_asked, written
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.integration.checkpoint import load_config, resolve_device, skeleton
from rankwise.layers.experts import UnstackedExperts
from rankwise.layers.matrices import Shape, find_matrices, unstack_experts
from rankwise.layers.precision import computes_in
from rankwise.masks.student import TEACHER_BYTES
from rankwise.masks.trunk import KEPT_BYTES
from rankwise.recipe import Recipe
from rankwise.refinement.refinement import refinements_named

LIBRARIES = 400 * 2**20  # what torch, its kernels and the solvers take beyond what is resident when the figure is made
SLACK = 1.1  # for what an allocator cannot give back at once
TRAINED = 20  # bytes of a number that is trained: in float32 itself, its gradient, Adam's two means and what is made of it
ORDERING = 6  # moments of an MLP's neurons in float64, while these are ordered
LOGITS = 20  # bytes of every logit that a head makes at once: a loss holds five such tensors in float32


@dataclass(frozen=True)
class Shortage:
    """A run in memory for which less is there than it takes.

    needed, there: bytes of the host, or of the GPU where `gpu`. promise: what a run block by block may take instead.
    """

    needed: int
    there: int
    gpu: bool
    promise: int

    def refusal(self, instead: str) -> RankwiseError:
        """The error of work that runs in memory only."""
        return RankwiseError(f"the run {self}: {instead}, or take shorter windows (--length)")

    def __str__(self) -> str:
        where = "the GPU's memory" if self.gpu else "memory"
        return f"needs about {_about(self.needed)} in {where}, {_about(self.there)} are there"


def shortage(
    model: str | Path | PreTrainedModel, calibration: Any, recipe: Recipe, metrics: Collection[str], trains: bool
) -> Shortage | None:
    """What is missing for a run in memory, None where it fits.

    calibration: as of `compress`. metrics: those that matrices are decomposed in. trains: whether gradients go through the masked
    model. No weight is read. Raises `RankwiseError` where there is no such model or no matrix to compress in it.
    """
    if isinstance(model, PreTrainedModel):
        empty, device, dtype = _twin(model), device_of(model), model.dtype
    else:
        empty, device = skeleton(load_config(model)), resolve_device(recipe.device)
        dtype = _dtype_of(empty.config, recipe.dtype)
    unstack_experts(empty)
    shapes, _ = find_matrices(empty, recipe.include, recipe.exclude, recipe.rank_multiple, recipe.form)
    e = dtype.itemsize if computes_in(dtype, device) else 4
    stored = dtype.itemsize * sum(p.numel() for p in empty.parameters())
    held = stored if isinstance(model, PreTrainedModel) else 0
    needs = frozenset[str]().union(*(metric_named(metric).NEEDS for metric in metrics))
    own = written_at_once(empty, device) if isinstance(calibration, str) and calibration == "self" else 0
    trained = [set(refinement.trained(empty, shapes)) for refinement in refinements_named(recipe.refine or "")]
    text, there = _text(empty, calibration, recipe, device), memory.there(device)
    for sites in (shapes.keys(), None):  # as many as matrices at most; which of them share one, a run of the empty model tells
        totals = moments(empty, shapes, needs, sites)
        phases = _phases(empty, shapes, needs, totals, e, *text, trains, own, trained)
        if recipe.narrows:  # what is left of MLPs stands beside the original's
            widest, more = max(shape.in_features for shape in shapes.values()), e * sum(shape.dense for shape in shapes.values())
            phases = {name: taken + more * (name in ("ranks", "refinement")) for name, taken in phases.items()}
            phases["narrowing"] = phases["decomposition"] + _wider(empty, e) + more + ORDERING * 8 * widest**2
        computed, fixed = int(SLACK * (max(phases.values()) - held)), memory.resident() + LIBRARIES
        needed = {"host": fixed + computed}
        if device.type == "cuda":
            carried = max(stored - held, totals)  # weights on their way, moments to the run folder
            needed = {"gpu": computed, "host": fixed + int(SLACK * carried)}
        short = [kind for kind, count in needed.items() if count > there[kind]]
        if not short:
            return None
    kind = short[0]
    return Shortage(needed[kind], there[kind], kind == "gpu", memory.promise(there))


def whole_run(model: nn.Module, shapes: Mapping[str, Shape], needs: Collection[str]) -> int:
    """Bytes that a run of this empty model takes in memory, the activations of a batch apart."""
    e = max(p.element_size() for p in model.parameters())
    return e * sum(p.numel() for p in model.parameters()) + e * components(shapes) + moments(model, shapes, needs)


def moments_of(shape: Shape, outputs: bool) -> int:
    """Bytes of a matrix's second moments, H in float64 and, where it is needed, G in float32."""
    return 8 * shape.in_features**2 + 4 * shape.out_features**2 * outputs


def moments(empty: nn.Module, shapes: Mapping[str, Shape], needs: Collection[str], sites: Collection[str] | None = None) -> int:
    """Bytes of the second moments of all sites of an empty model, or of these sites."""
    sites = () if "input" not in needs else _sites(empty, shapes) if sites is None else sites
    return sum(8 * shapes[site].in_features ** 2 for site in sites) + ("output" in needs) * sum(
        4 * shape.out_features**2 for shape in shapes.values()
    )


def workspace(shape: Shape, outputs: bool) -> int:
    """Bytes that `decompose` takes at its peak for float32 or smaller weights, beyond the weight and the moments, as measured:
    the most of two moments of it, where products are formed and where they are solved. With a metric on outputs it is float64
    throughout, G too, and of a tall weight that metric's root may be the largest part."""
    m, n = shape.out_features, shape.in_features
    if m <= n and outputs:
        return 8 * m * m + max(26 * m * n + 26 * m * m, 16 * m * n + 44 * m * m)
    if m <= n:
        return max(22 * m * n + 8 * m * m, 12 * m * n + 36 * m * m)
    if outputs:
        return 8 * m * m + max(16 * m * m + 16 * m * n, 8 * m * m + 32 * m * n + 40 * n * n)
    return max(12 * m * n + 22 * n * n, 8 * m * n + 46 * n * n)


def _phases(
    empty: Any,
    shapes: Mapping[str, Shape],
    needs: Collection[str],
    totals: int,
    e: int,
    batch: int,
    text: int,
    trains: bool,
    own: int,
    trained: Collection[Collection[str]],
) -> dict[str, int]:
    """The most bytes that each part of the work holds at once. totals: bytes of the moments; batch, text: tokens of one, and of
    all; own: of the text that the model writes at once; trained: the matrices that each refinement trains at once."""
    config = empty.config.get_text_config()
    d, layers = getattr(config, "hidden_size", 1), getattr(config, "num_hidden_layers", 1)
    weights = e * sum(p.numel() for p in empty.parameters())
    factors = e * components(shapes)
    widest = max(shape.per_rank for shape in shapes.values())
    forward = e * batch * (8 * d + 4 * widest)
    backward, masked = (int(e * batch * numbers_of_a_token(empty, of_components)) for of_components in (0, 2))
    answers = min(TEACHER_BYTES, e * d * text) + min(KEPT_BYTES, e * d * layers * text // 10)
    learned = max((sum(shapes[name].dense for name in names) for names in trained), default=0)
    solved = max(workspace(shape, "output" in needs) for shape in shapes.values())
    vocabulary = vocabulary_of(empty)
    logits = LOGITS * min(batch * vocabulary, max(LOGITS_AT_ONCE, vocabulary))
    return {
        "text": weights + int(kept_of_a_token(empty) * min(text, own)),
        "statistics": weights + totals + (backward if GRADIENTS & set(needs) else forward) + logits,
        "decomposition": weights + totals + factors + solved,
        "ranks": weights + factors + answers + logits + max(masked if trains else forward, _wider(empty, e) + 4 * forward // e),
        "refinement": bool(trained) * (weights + factors + TRAINED * learned + answers + masked + logits),
    }


def _wider(empty: nn.Module, e: int) -> int:
    """Bytes that the model takes beyond its own while matrices are measured one by one, in float32."""
    return max(0, 4 - e) * sum(p.numel() for p in empty.parameters())


def components(shapes: Mapping[str, Shape]) -> int:
    """Numbers in the full-length factors of all matrices."""
    return sum(shape.full_rank * shape.per_rank for shape in shapes.values())


def _text(empty: Any, calibration: Any, recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Tokens of a batch, and of all of the text."""
    if isinstance(calibration, Tensor) and calibration.ndim == 2:
        samples, length = calibration.shape
    elif not isinstance(calibration, str | Path | Tensor) and calibration and isinstance(calibration[0], Mapping):
        read = (written(dict(batch)) for batch in calibration if isinstance(batch, Mapping) and batch)
        sizes = [value.shape[:2].numel() for value in read if isinstance(value, Tensor)]
        return max(sizes, default=1), sum(sizes)
    else:
        length, samples = windows_asked(empty, recipe.effort, device.type, recipe.length, recipe.samples)
    fits = int(room_for_a_batch(device) / (4 * numbers_of_a_token(empty)))
    return min(samples, max(1, min(TOKENS_PER_BATCH, fits) // max(length, 1))) * length, samples * length


def _sites(empty: Any, shapes: Mapping[str, Shape]) -> set[str]:
    """The sites of an empty model's matrices; where it cannot be run, every matrix is taken for one."""
    for module in empty.modules():
        if isinstance(module, UnstackedExperts):  # which ones a token goes to is in no empty tensor; each is its own site anyway
            vars(module)["forward"] = lambda hidden, *_: hidden

    def run() -> None:
        try:
            empty(**dict.fromkeys(sides(empty), torch.zeros(1, PROBE, dtype=torch.int64, device="meta")))
        except Exception:  # models ask for values in as many ways as there are
            return

    return set(find_sites(empty, shapes, run).values())


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in memory without its values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _dtype_of(config: Any, asked: str) -> torch.dtype:
    """The dtype that weights are loaded in."""
    dtype = getattr(config, "dtype", None) if asked == "auto" else getattr(torch, asked)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _about(count: int) -> str:
    return f"{count / 10**9:.0f} GB" if count >= 10**10 else f"{count / 10**9:.3g} GB"
