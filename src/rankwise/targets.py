"""A target in the user's units as a budget: a rate, bytes of the checkpoint, or a speed-up of decoding on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from rankwise.allocation.plan import Budget, Ranks, Shapes, least, parameters
from rankwise.errors import RankwiseError
from rankwise.layers.linear import weight_of
from rankwise.layers.quantised import WIDTHS
from rankwise.layers.tables import table_bytes, tables_of
from rankwise.narrowing import narrowest
from rankwise.recipe import MIXED, Recipe
from rankwise.run_folder import digest
from rankwise.runtime.latency import Latency, TimedShape, time_layers
from rankwise.starting import Run, budget_of, kept_ranks


@dataclass(frozen=True)
class Target:
    """What a recipe asks for, ready to be spent. latency: of this machine, where a speed-up is asked for."""

    recipe: Recipe
    latency: Latency | None = None

    @classmethod
    def of(cls, run: Run, recipe: Recipe) -> Target:
        """Time this machine where a speed-up is asked for; matrices that no rank makes faster, nor fewer neurons, are left dense
        from here on.

        Raises `RankwiseError` for a target that cannot be reached.
        """
        latency = None
        if recipe.target_speedup is not None:
            latency = latency_of(run)
            for name in (
                [] if recipe.narrows else [n for n, s in latency.shapes.items() if not s.largest_rank(recipe.rank_multiple)]
            ):
                run.left_dense[name] = "no rank makes it faster on this machine"
                del run.shapes[name]
        target = cls(recipe, latency)
        if recipe.width is None:
            target.budget(run)
        return target

    def budget(self, run: Run) -> tuple[Shapes, Budget]:
        """The matrices with their costs, and what may be spent: parameters, or nanoseconds. Raises `RankwiseError`."""
        recipe, multiple = self.recipe, self.recipe.rank_multiple
        if recipe.ranks is not None:
            ranks = {name: recipe.ranks[name] for name in run.shapes}
            return run.shapes, Budget(parameters(ranks, run.shapes), multiple)
        if recipe.rate is not None:
            return run.shapes, budget_of(run, recipe, recipe.rate)
        settled = kept_ranks(run.model, run.shapes, recipe)
        if self.latency is not None:
            return self._time_budget(run, self.latency, settled)
        assert recipe.target_bytes is not None
        budget_of_bytes = mixed_budget if recipe.bits == MIXED else bytes_budget
        return run.shapes, budget_of_bytes(run.model, run.shapes, recipe.target_bytes, multiple).settling(settled, run.shapes)

    def costs(self, run: Run) -> Shapes:
        """The matrices with their costs."""
        return run.shapes if self.latency is None else self.latency.costs(run.shapes)

    def _time_budget(self, run: Run, latency: Latency, settled: Ranks) -> tuple[Shapes, Budget]:
        multiple, speedup = self.recipe.rank_multiple, self.recipe.target_speedup
        assert speedup is not None
        shapes = latency.costs(run.shapes)
        dense = sum(shape.dense for shape in shapes.values())
        budget = Budget(int(latency.step / speedup) - (latency.step - dense), multiple)
        smallest = narrowest(run, replace(budget, settled=settled), shapes) if self.recipe.narrows else shapes
        fewest = least(smallest, multiple)
        if budget.parameters < fewest:
            fastest, narrow = latency.step / (latency.step - dense + fewest), ", with the fewest neurons," * self.recipe.narrows
            raise RankwiseError(
                f"target_speedup={speedup} cannot be reached: rank {multiple} in every "
                f"matrix{narrow} decodes {fastest:.2f} times as fast on this machine, where the "
                f"rest of the model takes {1 - dense / latency.step:.0%} of the time. Ask for less",
            )
        return shapes, budget.settling(settled, shapes, smallest)


def bytes_budget(model: Any, shapes: Shapes, target: int, multiple: int) -> Budget:
    """The budget of parameters whose checkpoint, safetensors headers included, takes at most `target` bytes. Raises
    `RankwiseError`."""
    whole, others, header = _other_bytes(model, shapes, None)
    element = max(weight_of(model.get_submodule(name)).element_size() for name in shapes)
    others += sum(shape.index_bytes for shape in shapes.values())
    dense, fewest = sum(shape.dense for shape in shapes.values()), least(shapes, multiple)
    allowed = (target - others) // element
    if allowed >= dense:
        raise RankwiseError(
            f"target_bytes={target:,}: the model takes only {whole + header:,} bytes. Ask for less",
        )
    if allowed < fewest:
        raise RankwiseError(
            f"target_bytes={target:,} cannot be reached: with rank {multiple} in every matrix "
            f"the model still takes {others + fewest * element:,} bytes. Ask for at least that",
        )
    return Budget(allowed, multiple)


def mixed_budget(model: Any, shapes: Shapes, target: int, multiple: int) -> Budget:
    """The budget of bytes for the tensors of the matrices, whose checkpoint takes at most `target`. Raises `RankwiseError`."""
    others, most = _beside_bits(model, shapes)
    weights = {name: weight_of(model.get_submodule(name)) for name in shapes}
    fewest = sum(
        min(shape.stored_bytes(rank, bits, weights[name].dtype) for rank, bits in ((None, min(WIDTHS)), (multiple, max(WIDTHS))))
        for name, shape in shapes.items()
    )
    if target >= most:
        raise RankwiseError(f"target_bytes={target:,}: the model takes only {most:,} bytes. Ask for less")
    if target - others < fewest:
        raise RankwiseError(
            f"target_bytes={target:,} cannot be reached: the smallest this model can be written is "
            f"{others + fewest:,} bytes. Ask for at least that"
        )
    return Budget(target - others, multiple)


def bytes_in_bits(model: Any, shapes: Shapes, bits: float) -> int:
    """What the checkpoint takes with every matrix in `bits` bits, its scales beside them: of the two widths around it in
    proportion. It lies within those of `WIDTHS`."""

    def held(width: int) -> int:
        dtypes = ((shape, weight_of(model.get_submodule(name)).dtype) for name, shape in shapes.items())
        return sum(shape.stored_bytes(None, width, dtype) for shape, dtype in dtypes)

    below, above = max(w for w in WIDTHS if w <= bits), min(w for w in WIDTHS if w >= bits)
    share = (bits - below) / max(above - below, 1)
    return _beside_bits(model, shapes)[0] + round((1 - share) * held(below) + share * held(above))


def _beside_bits(model: Any, shapes: Shapes) -> tuple[int, int]:
    """Bytes of what a checkpoint in few bits holds beside the matrices, and of the dense one."""
    whole, others, header = _other_bytes(model, shapes, max(WIDTHS))
    as_they_are, in_bits = table_bytes(tables_of(model, shapes))
    return others - as_they_are + in_bits, whole + header


def _other_bytes(model: Any, shapes: Shapes, bits: int | None) -> tuple[int, int, int]:
    """Bytes of the dense model's tensors; of what the checkpoint holds beside the matrices, its headers included; of these."""
    stored = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}.values()  # tied ones once
    whole = sum(tensor.nbytes for _, tensor in stored)
    header = _header([(name, tensor.shape) for name, tensor in stored], shapes, bits, whole)
    return whole, whole - sum(weight_of(model.get_submodule(name)).nbytes for name in shapes) + header, header


def _header(stored: list[tuple[str, torch.Size]], shapes: Shapes, bits: int | None, whole: int) -> int:
    """Bytes of the checkpoint's headers at most: every matrix of low rank, with its guard, every number at its longest."""
    entries = [(name, list(shape)) for name, shape in stored]
    for name, shape in shapes.items():
        sides = [shape.out_features, shape.in_features]
        entries += [(f"{name}.{tensor}", sides) for tensor in shape.empty(1, bits, bias=True).state_dict()]
    texts = (json.dumps({name: {"dtype": "BF16", "shape": s, "data_offsets": [whole, whole]}}) for name, s in entries)
    return sum(map(len, texts)) + 1024


def latency_of(run: Run) -> Latency:
    """The table of this machine, kept in the run folder: a resumed run spends the same budget. Raises `RankwiseError` for a model
    that does not decode."""

    def compute() -> dict[str, torch.Tensor]:
        found = time_layers(run.model, run.shapes)
        numbers = {n: torch.tensor([[0, *s.ranks], [s.dense_time, *s.times]]) for n, s in found.shapes.items()}
        few = {f"{n} in bits": torch.tensor(s.in_bits, dtype=torch.int64) for n, s in found.shapes.items()}
        return numbers | few | {"": torch.tensor(found.step)}

    saved = run.folder.together("latency", digest(run.identity, "and in bits"), compute)
    shapes = {}
    for name, shape in run.shapes.items():
        (_, *ranks), (dense, *times) = saved[name].tolist()
        in_bits = tuple((bits, time) for bits, time in saved[f"{name} in bits"].tolist())
        shapes[name] = TimedShape.of_times(shape, dense, tuple(ranks), tuple(times), in_bits)
    return Latency(shapes, int(saved[""]))
