"""Effective rank: ranks follow the root of each matrix's effective rank (D-Rank, 2025, arXiv 2509.25622).

R = exp(-sum_i p_i log p_i) with p_i = sigma_i^2 / sum_j sigma_j^2. Within each type of matrix (the last part of its path)
min sum_g R_g / k_g  s.t.  sum_g k_g w_g = T  has the solution  k_g = T / sum_j sqrt(R_j w_j) * sqrt(R_g / w_g), w = m + n.
Then queries and keys give beta of their ranks away, and the values share it equally.

Deviations: no basis is shared between layers (n = 1, as the paper for grouped queries); the gift is counted in parameters,
because values need not have the queries' shape; ranks at or above break-even become dense, and one factor on all ranks spends
what that saves.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.energy import relative_energy
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.proportional import proportional

GIVERS = {"q_proj", "k_proj", "q_lin", "k_lin", "query", "key", "q", "k"}
TAKERS = {"v_proj", "v_lin", "value", "v"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EffectiveRank:
    """beta: the fraction that queries and keys give to the values; the paper takes 0.3 to 0.4."""

    decomposition: ClassVar[str] = "whitened"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.3

    def allocate(self, problem: Problem) -> Allocation:
        """Ranks in proportion to the formula's."""
        return proportional(problem, self._formula(problem), [])

    def _formula(self, problem: Problem) -> dict[str, float]:
        """k_g before rounding."""
        shapes = problem.shapes
        kind = {name: name.rpartition(".")[2] for name in shapes}
        keep = problem.budget.parameters / sum(shape.dense for shape in shapes.values())
        effective = {name: effective_rank(problem.spectra[name]) for name in shapes}
        ranks: dict[str, float] = {}
        for one in dict.fromkeys(kind.values()):
            group = [name for name in shapes if kind[name] == one]
            total = keep * sum(shapes[name].dense for name in group)
            norm = sum((effective[name] * shapes[name].per_rank) ** 0.5 for name in group)
            ranks |= {name: total / norm * (effective[name] / shapes[name].per_rank) ** 0.5 for name in group}
        takers = [name for name in shapes if kind[name] in TAKERS]
        givers = [name for name in shapes if kind[name] in GIVERS and takers]
        gift = sum(self.beta * ranks[name] * shapes[name].per_rank for name in givers)
        return (
            ranks
            | {name: (1 - self.beta) * ranks[name] for name in givers}
            | {name: ranks[name] + gift / len(takers) / shapes[name].per_rank for name in takers}
        )


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the relative energies: between 1 and k."""
    return torch.special.entr(relative_energy(spectrum)).sum().exp().item()
