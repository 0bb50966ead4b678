"""ARS's masks: a hyper-network gives every component a logit, and a Gumbel-sigmoid sample of them is the mask.

Legend: L matrices, N_l components of matrix l, m_l [N_l] its mask, s_l [N_l] its singular values, M_l x N_l its shape in c_l =
M_l + N_l (parameters of a unit of rank).

Gao et al.: Adaptive Rank Selections for Low-Rank Approximation of Language Models, NAACL 2024, 2024.naacl-long.13.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.layers.matrices import Shape


class HyperNetwork(nn.Module):
    """Fixed noise z [L, inputs] -> bidirectional GRU -> LayerNorm -> GeLU -> one linear head per matrix: logits [N_l]."""

    z: Tensor

    def __init__(self, lengths: Mapping[str, int], seed: int, inputs: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.names = list(lengths)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.register_buffer("z", torch.randn(len(lengths), inputs))
            self.gru = nn.GRU(inputs, hidden, bidirectional=True)
            self.norm = nn.LayerNorm(2 * hidden)
            self.heads = nn.ModuleList(nn.Linear(2 * hidden, length) for length in lengths.values())

    def forward(self) -> dict[str, Tensor]:
        """Matrix -> its logits [N_l]."""
        features = F.gelu(self.norm(self.gru(self.z)[0]))
        return {name: head(row) for name, head, row in zip(self.names, self.heads, features, strict=True)}


def size(masks: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> Tensor:
    """T(m) = sum_l c_l 1^T m_l, the parameters of the factors; the method knows no dense option."""
    return torch.stack([shapes[name].numbers(mask.sum()) for name, mask in masks.items()]).sum()


def excess(size: Tensor, target: float) -> Tensor:
    """R(a, c) = log(max(a, c) / c): zero from the target down."""
    return (size / target).clamp_min(1).log()


def misalignment(masks: Mapping[str, Tensor], spectra: Mapping[str, Tensor]) -> Tensor:
    """R_align = 1/L sum_l ||m_l s_l - m'_l s_l||^2, where m'_l keeps the first components, as many as m_l does."""
    terms = []
    for name, mask in masks.items():
        prefix = torch.arange(len(mask), device=mask.device) < mask.detach().sum().round()
        terms.append((spectra[name] * (mask - prefix.to(mask))).square().sum())
    return torch.stack(terms).mean()
