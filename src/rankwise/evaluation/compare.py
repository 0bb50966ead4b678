"""What compression cost: the original and the compressed model on the very same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.calibration.signal import Signal, divergence
from rankwise.calibration.tokens import Batch
from rankwise.evaluation.intervals import Interval, clipped, of_ratio
from rankwise.progress import progress

Values = Callable[[Batch], tuple[Tensor, bool]]  # as `values_of`: logits [sequences, length, vocabulary] or features


@dataclass(frozen=True)
class Comparison:
    """Means over the predicted tokens: each window's, but for its first.

    kl: KL(reference || compressed), nats per token.
    agreement: fraction of tokens with the same most likely token, and flips, of those with another; None without a head.
    perplexity, reference_perplexity: exp of the mean negative log likelihood; None for a model that predicts no next token.
    perplexity_ratio: perplexity / reference_perplexity.
    intervals: of each of these by name, [low, high] at 95 %, from the spread over windows (see `intervals`); that of the ratio
        is paired, window by window, and so narrower than those of its parts. None where there is one window only.
    """

    kl: float
    agreement: float | None
    perplexity: float | None
    reference_perplexity: float | None
    tokens: int
    windows: int
    flips: float | None = None
    perplexity_ratio: float | None = None
    intervals: dict[str, Interval | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def compare(reference: Values, compressed: Values, batches: Iterable[Batch], causal: bool) -> Comparison:
    """Compare two models, given as functions from a batch to their values. `causal`: position t predicts token t + 1."""
    windows, has_head, has_loss = 0, False, False
    rows = []
    for batch in progress(list(batches), "measuring"):
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        answers = [f(batch) for f in (reference, compressed)]
        has_head, has_loss = answers[0][1], causal and ids is not None
        sequences = len(answers[0][0])
        windows += sequences
        # Features are compared in units of their variance over the batch, which therefore stays in one piece.
        for part in range(sequences) if has_head else [slice(None)]:
            cut = slice(part, part + 1) if isinstance(part, int) else part
            own = None if mask is None else mask[cut]
            p, q = (Signal(_positions(values[cut], own, causal), categorical) for values, categorical in answers)
            agree = (p.values.argmax(-1) == q.values.argmax(-1)).sum().item() if has_head else 0
            row = [len(p.values), divergence(p, q).item(), agree]
            if has_loss:
                assert ids is not None
                targets = _positions(ids[cut].to(p.values.device).roll(-1, dims=1)[..., None], own, causal).squeeze(-1)
                row += [F.cross_entropy(s.values.float(), targets, reduction="none").double().sum().item() for s in (p, q)]
            rows.append(row)
    return _summary(torch.tensor(rows, dtype=torch.float64), windows, has_head, has_loss)


def _summary(rows: Tensor, windows: int, has_head: bool, has_loss: bool) -> Comparison:
    """rows [windows, 3 or 5] float64: each window's tokens, and sums over them of KL, agreement and both losses."""
    tokens = rows[:, 0]
    mean = {"kl": _mean(rows[:, 1], tokens)}
    intervals = {"kl": clipped(of_ratio(rows[:, 1], tokens), (0, math.inf))}
    if has_head:
        mean["agreement"] = _mean(rows[:, 2], tokens)
        mean["flips"] = 1 - mean["agreement"]
        intervals["agreement"] = clipped(of_ratio(rows[:, 2], tokens), (0, 1))
        intervals["flips"] = clipped(of_ratio(tokens - rows[:, 2], tokens), (0, 1))
    if has_loss:
        losses = {"perplexity": rows[:, 4], "reference_perplexity": rows[:, 3], "perplexity_ratio": rows[:, 4] - rows[:, 3]}
        for name, loss in losses.items():
            interval = of_ratio(loss, tokens)
            mean[name] = _exp(_mean(loss, tokens))
            intervals[name] = None if interval is None else [_exp(bound) for bound in interval]
    fields = {"agreement": None, "perplexity": None, "reference_perplexity": None} | mean
    return Comparison(**fields, tokens=int(tokens.sum()), windows=windows, intervals=intervals)  # type: ignore[arg-type]


def _mean(sums: Tensor, tokens: Tensor) -> float:
    return (sums.sum() / tokens.sum()).item()


def _exp(value: float) -> float:
    """Infinite where it would overflow: a model can be that wrong."""
    return math.exp(value) if value < 700 else math.inf


def _positions(values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[sequences, length, c] -> [tokens, c]: without padding and, for a causal model, without each last position."""
    if values.ndim == 2:
        return values
    if mask is not None:
        mask = mask.bool().to(values.device)
    if causal:
        values, mask = values[:, :-1], None if mask is None else mask[:, :-1] & mask[:, 1:]
    return values.flatten(0, 1) if mask is None else values[mask]
