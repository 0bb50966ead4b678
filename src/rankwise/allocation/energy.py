"""Energy: components are kept in the order of the relative energy they give per parameter, over all matrices together.

p_i = sigma_i^2 / sum_j sigma_j^2, one matrix's share of its own energy; score p_i / (m + n). This is the greedy allocation
that MRCS-like baselines use (as compared in LEMS, openreview IjIgNPFuCt). Deviation: a matrix that the greedy order
takes to its break-even rank is dense from there on.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import by_threshold


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Energy:
    """One threshold on p_i / (m + n)."""

    decomposition: ClassVar[str] = "whitened"

    def allocate(self, problem: Problem) -> Allocation:
        """The components of most relative energy per parameter."""
        shapes = problem.shapes
        return by_threshold(problem, {n: relative_energy(s) / shapes[n].per_rank for n, s in problem.spectra.items()})


def relative_energy(spectrum: Tensor) -> Tensor:
    """p_i = sigma_i^2 / sum_j sigma_j^2 [k] float64; all zero for a matrix that is zero."""
    squares = spectrum.double().cpu().square()
    return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
