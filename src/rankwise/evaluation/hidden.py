"""How many directions a model's last hidden states use: a compressed model that has collapsed uses fewer.

legend: L tokens of a window, d hidden size, Z [L, d] the window's last hidden states, the mean over its tokens subtracted and
each row divided by its norm; sigma_i the singular values of Z
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.calibration.signal import call, frozen, signal_of, token_mask
from rankwise.calibration.tokens import Batch
from rankwise.evaluation.intervals import of_ratio
from rankwise.layers.precision import exact
from rankwise.progress import progress

WINDOWS = 16  # the first ones: a decomposition each, and the spread over windows is small


def standardised(states: Tensor) -> Tensor:
    """Z [L, d] float32 of hidden states [L, d]."""
    states = states.float()
    return F.normalize(states - states.mean(dim=0), dim=1)


def nuclear_norm(Z: Tensor) -> float:
    """Matrix Nuclear-Norm (Li et al. 2024, arXiv 2410.10672, code github.com/MLGroupJLU/MatrixNuclearNorm): the sum of the D
    largest column norms over L, D = min(L, d). An approximation of sum_i sigma_i / L that needs no decomposition; where L >= d
    it bounds it from above. A larger model that compresses information better has a lower one.
    """
    length, width = Z.shape
    return (Z.norm(dim=0).topk(min(length, width)).values.sum() / length).item()


def effective_rank(Z: Tensor) -> float:
    """exp(-sum_i p_i ln p_i), p_i = sigma_i^2 / sum_j sigma_j^2: the effective rank (Roy and Vetterli 2007) of the tokens'
    covariance Z^T Z / L, as Diff-eRank takes it of hidden states (Wei et al. 2024, arXiv 2401.17139). From 1 to min(L, d).
    """
    Z = Z if Z.shape[0] >= Z.shape[1] else Z.T
    p = torch.linalg.eigvalsh(exact(Z.T) @ exact(Z)).clamp_min(0)
    p = p[p > 0] / p.sum()
    return (-(p * p.log()).sum()).exp().item()


MEASURES = {"nuclear_norm": nuclear_norm, "effective_rank": effective_rank}


@torch.no_grad()
def hidden_measures(models: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Any]:
    """Every measure's mean over the first windows for each model, with its interval; the same windows for all.

    Empty for a model that does not show its hidden states.
    """
    windows = [{k: t[i : i + 1] for k, t in batch.items()} for batch in batches for i in range(len(next(iter(batch.values()))))]
    windows = windows[:WINDOWS]
    found: dict[str, Any] = {name: {"intervals": {}} for name in MEASURES}
    for kind, model in models.items():
        values: dict[str, list[float]] = {name: [] for name in MEASURES}
        with frozen(model):
            for window in progress(windows, f"hidden states, {kind}"):
                states = last_states(model, window)
                if states is None:
                    return {}
                Z = standardised(states)
                for name, measure in MEASURES.items():
                    values[name].append(measure(Z))
        for name, column in values.items():
            numbers = torch.tensor(column, dtype=torch.float64)
            found[name][kind] = numbers.mean().item()
            found[name]["intervals"][kind] = of_ratio(numbers, torch.ones_like(numbers))
    return {"windows": len(windows), **found}


def last_states(model: nn.Module, window: Batch) -> Tensor | None:
    """The last hidden states [L, d] over the tokens of one sequence that are not padding; None where the model keeps them."""
    signal = signal_of(model, window)
    if signal.head is not None:  # what its head reads, without the logits
        return signal.values
    output = call(model, window, output_hidden_states=True)
    layers = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    if not layers:
        return None
    states: Tensor = layers[-1][0]
    mask = token_mask(window)
    return states if mask is None else states[mask[0].to(states.device)]
