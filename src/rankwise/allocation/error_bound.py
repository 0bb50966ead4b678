"""Error bounds on the layers' own relative errors, e_r^2 = sum_{i > r} sigma_i^2 / sum_i sigma_i^2.

`ErrorBound`: L-GreCo (Alimohammadi et al. 2022, arXiv 2210.17357) looks for the fewest parameters whose summed squared errors
are no more than a uniform compression's. Here the budget is given, so this is its dual: the least sum of e^2 within the budget;
and the knapsack is solved over the errors themselves, not over discretised ones.

`UniformError`: PGSVD (2025, arXiv 2510.05544) shows that one relative error tolerance for
all layers is Pareto-optimal for a bound on the loss; the tolerance is found by bisection. Its ALS factors are left out.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from rankwise.allocation.energy import relative_energy
from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import by_threshold


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ErrorBound:
    """min sum_l e_l^2."""

    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        """The least sum of squared relative errors."""
        prices = {name: relative_energy(spectrum) for name, spectrum in problem.spectra.items()}
        return Allocation.of_prefixes(knapsack(prices, problem.shapes, problem.budget), problem.spectra)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UniformError:
    """min max_l e_l: each matrix takes the smallest rank whose error is within the tolerance."""

    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        """The same relative error everywhere. A component is needed where the error without it is above the tolerance."""
        energies = {name: relative_energy(spectrum) for name, spectrum in problem.spectra.items()}
        return by_threshold(problem, {name: p.flip(0).cumsum(0).flip(0).sqrt() for name, p in energies.items()})
