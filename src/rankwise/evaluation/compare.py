"""What compression cost: the original and the compressed model on the very same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.calibration.signal import Signal, divergence
from rankwise.calibration.tokens import Batch
from rankwise.progress import progress

Values = Callable[[Batch], tuple[Tensor, bool]]  # as `values_of`: logits [sequences, length, vocabulary] or features


@dataclass(frozen=True)
class Comparison:
    """Means over the predicted tokens: each window's, but for its first.

    kl: KL(reference || compressed), nats per token.
    agreement: fraction of tokens with the same most likely token; None for a model without a head.
    perplexity, reference_perplexity: exp of the mean negative log likelihood; None for a model that predicts no next token.
    """

    kl: float
    agreement: float | None
    perplexity: float | None
    reference_perplexity: float | None
    tokens: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def compare(reference: Values, compressed: Values, batches: Iterable[Batch], causal: bool) -> Comparison:
    """Compare two models, given as functions from a batch to their values. `causal`: position t predicts token t + 1."""
    kl, agree = 0.0, 0
    losses = [0.0, 0.0]
    tokens = windows = 0
    for batch in progress(list(batches), "measuring"):
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        answers = [f(batch) for f in (reference, compressed)]
        p, q = (Signal(_positions(values, mask, causal), categorical) for values, categorical in answers)
        kl += divergence(p, q).item()
        agree += int((p.values.argmax(-1) == q.values.argmax(-1)).sum())
        if causal and ids is not None:
            targets = _positions(ids.to(p.values.device).roll(-1, dims=1)[..., None], mask, causal).squeeze(-1)
            for i, signal in enumerate((p, q)):
                losses[i] += F.cross_entropy(signal.values.float(), targets, reduction="none").double().sum().item()
        tokens += len(p.values)
        windows += len(next(iter(batch.values())))
    reference_ppl, ppl = (math.exp(loss / tokens) if loss else None for loss in losses)
    agreement = agree / tokens if p.categorical else None
    return Comparison(kl / tokens, agreement, ppl, reference_ppl, tokens, windows)


def _positions(values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[sequences, length, c] -> [tokens, c]: without padding and, for a causal model, without each last position."""
    if values.ndim == 2:
        return values
    if mask is not None:
        mask = mask.bool().to(values.device)
    if causal:
        values, mask = values[:, :-1], None if mask is None else mask[:, :-1] & mask[:, 1:]
    return values.flatten(0, 1) if mask is None else values[mask]
