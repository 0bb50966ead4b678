"""Heavy tail: one threshold on the normalised singular values of the raw weight (WeLore, Jaiswal et al. 2024,
arXiv 2407.11239): a spectrum of few large values and a long tail of small ones gives much, a flat one gives little.

s_i = (sigma_i - sigma_min) / (sigma_max - sigma_min); components with s_i above the threshold are kept. The paper's code then
leaves dense what is reduced by less than half of its rank; here the break-even rank decides. Its fine-tuning is left out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.threshold import by_threshold
from rankwise.layers.precision import exact


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeavyTail:
    """One threshold on s_i, of the raw weights whatever the metric."""

    decomposition: ClassVar[str] = "svd"

    def allocate(self, problem: Problem) -> Allocation:
        """The components whose normalised singular values are largest."""
        return by_threshold(problem, {n: normalised(problem.student.weight(n)) for n in problem.shapes})


@torch.no_grad()
def normalised(W: Tensor) -> Tensor:
    """The singular values of W [m, n], from 1 down to 0: [min(m, n)] float64; all zero where they are all the same."""
    values = torch.linalg.svdvals(exact(W))
    return (values - values[-1]) / (values[0] - values[-1]).clamp_min(torch.finfo(torch.float64).tiny)
