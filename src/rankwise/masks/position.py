"""Dobi-SVD's masks: one trainable position per matrix, where its components end.

Wang et al.: Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, ICLR 2025, arXiv 2502.02723;
code github.com/wangqinsi1/Dobi-SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor


def position_mask(position: Tensor, length: int, beta: float) -> Tensor:
    """The mask [length]: mask_i = 0.5 tanh(beta (position - i)) + 0.5, i = 1 ... length; a scalar position inside [1, length]."""
    index = torch.arange(1, length + 1, device=position.device)
    return 0.5 * torch.tanh(beta * (position.clamp(1, length) - index)) + 0.5


def range_penalty(positions: Tensor, largest: Tensor) -> Tensor:
    """sum_l relu(-k_l)^2 + relu(k_l - K_l)^2 over positions k [L] and the largest ones K [L]."""
    return ((-positions).relu().square() + (positions - largest).relu().square()).sum()
