"""ARA's masks: a few parameters say how likely each rank is; the mask that follows can only fall along the components.

Legend: theta [D], alpha = softmax(theta), B [D, k] the fixed binary staircase, p = alpha^T B [k] the chance that component i is
kept: it never rises with i, and its sum is the mean rank. Every theta_d moves every rank.

Xv et al.: ARA: Adaptive Rank Allocation for Efficient Large Language Model SVD Compression, arXiv 2510.19389.
"""

from __future__ import annotations

import torch
from torch import Tensor


def staircase(steps: int, length: int) -> Tensor:
    """B [steps, length] float32: row d = 1 ... D keeps the first d/D of the components."""
    ends = torch.arange(1, steps + 1) * length / steps
    return (torch.arange(length) < ends.round()[:, None]).float()


def staircase_mask(kept: Tensor, largest: int) -> Tensor:
    """The mask [k] of the chances `kept` [k]: the first components, as many as they sum up to; beyond rank `largest` all, as
    the dense matrix. Its gradient is that of the chances (straight through)."""
    rank = int(kept.detach().sum().round())
    rank = len(kept) if rank > largest else rank
    hard = (torch.arange(len(kept), device=kept.device) < rank).to(kept)
    return hard + (kept - kept.detach())
