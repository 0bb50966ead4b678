"""The plan: one rank, or dense, for every matrix; and the budget it must meet. Knows no model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from rankwise.errors import RankwiseError
from rankwise.layers.matrices import Shape
from rankwise.plain import to_json

Ranks = dict[str, int | None]  # path -> rank, or None for dense
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Budget:
    """Parameters that the compressible matrices may keep, and the multiple that every rank must be of.

    settled: the ranks of matrices about which no allocator is asked.
    """

    parameters: int
    multiple: int = 1
    settled: Ranks = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Shapes, rate: float, scope: str, model_parameters: int, multiple: int = 1) -> Budget:
        """The budget that removes at least `rate` of the parameters in `scope`: "linear" (the matrices) or "model" (all).

        The rate is taken as the decimal number that it prints as; one below one parameter removes nothing. Raises
        `RankwiseError` for a rate outside (0, 1) and for one that even the smallest rank everywhere does not reach.
        """
        if not 0 < rate < 1:
            raise RankwiseError(f"rate={rate} is the fraction of parameters to remove: it must lie between 0 and 1")
        dense = sum(shape.dense for shape in shapes.values())
        total = {"linear": dense, "model": model_parameters}[scope]
        wanted = Fraction(str(rate)) * total
        removed = 0 if wanted < 1 else math.ceil(wanted)
        fewest = least(shapes, multiple)
        if dense - removed < fewest:
            reachable = (dense - fewest) * 10_000 // total / 10_000
            raise RankwiseError(
                f"rate={rate} cannot be reached: rank {multiple} in every matrix removes {reachable:.2%} of the "
                f"parameters in scope {scope!r}; ask for at most {reachable}"
            )
        return cls(dense - removed, multiple)

    def settling(self, ranks: Ranks, costs: Shapes, smallest: Shapes | None = None) -> Budget:
        """This budget with the ranks of some matrices settled. smallest: what the others cost where they may be narrower. Raises
        `RankwiseError` where they cannot make up for it."""
        if not ranks:
            return self
        left = self.parameters - parameters(ranks, costs)
        others = costs.keys() - ranks.keys()
        fewest = least({name: (smallest or costs)[name] for name in others}, self.multiple)
        dense = sum(costs[name].dense for name in others)
        if not others:
            raise RankwiseError(
                "keep fixes every matrix: keep fewer, so that some can meet the target, or apply a plan",
            )
        if left < fewest:
            raise RankwiseError(
                f"keep leaves {max(left, 0):,} to the {len(others)} other matrices, which need at "
                f"least {fewest:,}: keep less, or remove less",
            )
        if left > dense:
            raise RankwiseError(
                f"keep alone removes {left - dense:,} more than the target does: keep more, or ask for a higher rate"
            )
        return replace(self, settled=ranks)

    def of_others(self, costs: Shapes) -> Budget:
        """What is left for the matrices that are not settled."""
        settled = {name: rank for name, rank in self.settled.items() if name in costs}
        return Budget(self.parameters - parameters(settled, costs), self.multiple)


def parameters(ranks: Mapping[str, int | None], shapes: Shapes) -> int:
    """Parameters of all matrices at their ranks."""
    return sum(shapes[name].parameters(rank) for name, rank in ranks.items())


def least(shapes: Shapes, multiple: int) -> int:
    """What the matrices cost at least: of the smallest rank, or dense where that is less."""
    return sum(min(shape.parameters(multiple), shape.dense) for shape in shapes.values())


def options(shape: Shape, multiple: int) -> list[int | None]:
    """The ranks that a matrix may have, rising; None, dense, comes last."""
    return [*range(multiple, shape.largest_rank(multiple) + 1, multiple), None]


def next_rank(shape: Shape, rank: int, multiple: int) -> int | None:
    """The rank one step up; None is dense."""
    return rank + multiple if rank + multiple <= shape.largest_rank(multiple) else None


def fill(ranks: Ranks, shapes: Shapes, budget: Budget, order: Iterable[str]) -> Ranks:
    """Spend what is left of the budget: one step for each matrix in `order` in turn, until no step fits any more."""

    @functools.cache  # a mixture of experts takes millions of steps where few components have a price
    def step(shape: Shape, rank: int) -> tuple[int | None, int]:
        higher = next_rank(shape, rank, budget.multiple)
        return higher, shape.parameters(higher) - shape.parameters(rank)

    ranks, names = dict(ranks), list(order)
    left = budget.parameters - parameters(ranks, shapes)
    while names:
        fitting = []
        for name in names:
            rank = ranks[name]
            if rank is None:
                continue
            higher, cost = step(shapes[name], rank)
            if cost <= left:
                ranks[name], left = higher, left - cost
                fitting.append(name)
        names = fitting
    return ranks


def write_ranks(path: Path, ranks: Mapping[str, int | None]) -> None:
    """One matrix a line, null for dense: readable, diffable, editable by hand."""
    path.write_text(to_json(ranks, indent=1) + "\n")
