"""What compression cost: the original and the compressed model on the very same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rankwise.calibration.tokens import Batch

Values = Callable[[Batch], Tensor]  # batch -> logits [sequences, length, vocabulary], or features without a head


@dataclass(frozen=True)
class Comparison:
    """Means over the predicted tokens: each window's, but for its first.

    kl: KL(reference || compressed), nats per token. agreement: fraction of tokens with the same most likely next token.
    perplexity, reference_perplexity: exp of the mean negative log likelihood; None for a model that predicts no next token.
    """

    kl: float
    agreement: float
    perplexity: float | None
    reference_perplexity: float | None
    tokens: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def compare(reference: Values, compressed: Values, batches: Iterable[Batch], causal: bool) -> Comparison:
    """Compare two models, given as functions from a batch to logits. `causal`: position t predicts token t + 1."""
    kl = agree = 0.0
    losses = [0.0, 0.0]
    tokens = windows = 0
    for batch in tqdm(list(batches), desc="measuring"):
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        p, q = (_positions(f(batch).float(), mask, causal) for f in (reference, compressed))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        if causal and ids is not None:
            targets = _positions(ids[..., None].to(p.device).roll(-1, dims=1), mask, causal)
            for i, log in enumerate((log_p, log_q)):
                losses[i] -= log.gather(-1, targets).double().sum().item()
        tokens += len(p)
        windows += len(next(iter(batch.values())))
    reference_ppl, ppl = (math.exp(loss / tokens) if causal else None for loss in losses)
    return Comparison(kl / tokens, agree / tokens, ppl, reference_ppl, tokens, windows)


def _positions(values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[sequences, length, c] -> [tokens, c]: without padding and, for a causal model, without each last position."""
    if values.ndim == 2:
        return values
    if mask is not None:
        mask = mask.bool().to(values.device)
    if causal:
        values, mask = values[:, :-1], None if mask is None else mask[:, 1:]
    return values.flatten(0, 1) if mask is None else values[mask]
