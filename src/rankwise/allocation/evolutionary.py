"""Evolutionary search: EvoPress (Sieberling et al. 2024, arXiv 2410.14649; code IST-DASLab/EvoPress).

The parent is uniform. A child makes one to three flips (min of two dice of three): one matrix gives a level of its parameters
to another. Children are judged by KL(original || child) in stages, fewer survivors on more text, where every stage reads as
many tokens in all (the paper: 64 children on 2,048, 8 on 16,384, 2 on 65,536); the parent competes in the last.

Deviations: flips are also between matrices of different size (the code's group rule "none"): a level is a fraction of the
smaller one's parameters, cut where the giver is at its least rank or the taker dense, so that every child has the same budget.
Defaults are for a small model in a minute or two; the paper's: generations=400, offspring=64, survivors=(8, 2, 1), tokens=2048.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import ClassVar

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from rankwise.allocation.plan import fill
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import rank_of
from rankwise.allocation.uniform import Uniform
from rankwise.calibration.tokens import Batch
from rankwise.masks.student import Student
from rankwise.progress import progress

Sizes = dict[str, int]  # matrix -> parameters it may use


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Evolutionary:
    """levels: equal steps of a matrix's parameters up to dense; tokens: that each child reads in the first stage;
    survivors: of each stage, the last keeps one."""

    decomposition: ClassVar[str] = "kronecker"
    levels: PositiveInt = 10
    generations: PositiveInt = 80
    offspring: PositiveInt = 16
    survivors: tuple[PositiveInt, ...] = (4, 1)
    tokens: PositiveInt = 1024

    def allocate(self, problem: Problem) -> Allocation:
        """Of every generation the best on text drawn anew."""
        student, random = problem.student, Random(problem.student.seed)
        pieces = cut(student.training, self.tokens)
        judge = Student(student.model, student.decompositions, pieces, (), student.seed, student.effort)
        parent = {n: problem.shapes[n].parameters(r) for n, r in Uniform().allocate(problem).ranks.items()}
        history = []
        bar = progress(range(1, self.generations + 1), "evolving")
        for generation in bar:
            children = [self.flipped(parent, problem, random) for _ in range(self.offspring)]
            for stage, survivors in enumerate(self.survivors, 1):
                text = random.sample(pieces, min(self.offspring // len(children) or 1, len(pieces)))
                children += [parent] * (stage == len(self.survivors))
                fitness = [judge.divergence(plan_of(child, problem).masks, text) for child in children]
                order = sorted(range(len(children)), key=fitness.__getitem__)
                children = [children[i] for i in order[:survivors]]
            parent = children[0]
            history.append({"step": f"generation {generation}", "kl": min(fitness)})
            bar.set_postfix(kl=f"{min(fitness):.5f}", refresh=False)
        best = plan_of(parent, problem)
        return Allocation(best.ranks, best.masks, history)

    def flipped(self, parent: Sizes, problem: Problem, random: Random) -> Sizes:
        """A child: the parent after one to three flips, of as many parameters in all."""
        child, shapes = dict(parent), problem.shapes
        spare = {n: parent[n] - shapes[n].parameters(problem.budget.multiple) for n in parent}
        for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
            givers = [n for n in child if spare[n] > 0]
            giver = random.choice(givers) if givers else None
            takers = [n for n in child if child[n] < shapes[n].dense and n != giver]
            if giver is None or not takers:
                break
            taker = random.choice(takers)
            level = min(shapes[giver].dense, shapes[taker].dense) // self.levels or 1
            amount = min(level, spare[giver], shapes[taker].dense - child[taker])
            for name, change in ((giver, -amount), (taker, amount)):
                child[name] += change
                spare[name] += change
        return child


def plan_of(sizes: Sizes, problem: Problem) -> Allocation:
    """The ranks that fit into the sizes; what rounding leaves is filled up, largest matrices first."""
    shapes, budget = problem.shapes, problem.budget
    ranks = {
        n: None if size >= shapes[n].dense else rank_of(shapes[n].rank_within(size), shapes[n], budget.multiple)
        for n, size in sizes.items()
    }
    ranks = fill(ranks, shapes, budget, sorted(shapes, key=lambda n: -shapes[n].per_rank))
    return Allocation.of_prefixes(ranks, problem.spectra)


def cut(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """The batches in pieces of about so many tokens, at least one sequence each."""
    return [
        {name: tensor[i : i + step] for name, tensor in batch.items()}
        for batch in batches
        for first in [next(iter(batch.values()))]
        for step in [max(1, tokens // first[0].numel())]
        for i in range(0, len(first), step)
    ]
