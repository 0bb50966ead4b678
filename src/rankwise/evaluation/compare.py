"""What compression cost: the original and the compressed model on the very same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.calibration.signal import Signal, divergence, kl_of, token_mask
from rankwise.calibration.tokens import Batch, written
from rankwise.evaluation.intervals import Interval, clipped, of_ratio
from rankwise.progress import progress
from rankwise.schema import Costs


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

    def to_dict(self) -> Costs:
        """The fields by name."""
        return cast(Costs, asdict(self))


@torch.no_grad()
def compare(
    reference: Callable[[Batch], Signal], compressed: Callable[[Batch], Signal], batches: Sequence[Batch], causal: bool
) -> Comparison:
    """Compare two models, given as functions from a batch to their signals. `causal`: position t predicts token t + 1."""
    rows: list[Tensor] = []
    has_head, has_loss = False, False
    for batch in progress(batches, "measuring"):
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
        p, q = reference(batch), compressed(batch)
        has_head, has_loss = p.categorical, causal and ids is not None
        if not has_head:  # features are compared in units of their variance over the batch, which therefore stays in one piece
            rows.append(torch.tensor([[len(p), divergence(p, q).item(), 0.0]], dtype=torch.float64))
            continue
        window, at, labels = _tokens_of(batch, len(p), ids if has_loss else None)
        sums = torch.zeros(int(window.max()) + 1, 5 if has_loss else 3, dtype=torch.float64)
        for part in p[at].chunks():
            sums.index_add_(0, window[part], _costs(p, q, at[part], None if labels is None else labels[part]))
        rows.append(sums)
    windows = sum(len(written(batch)) for batch in batches)
    return summary_of(torch.cat(rows), windows, has_head, has_loss)


def _tokens_of(batch: Batch, tokens: int, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of every token that counts: its window, its row in a signal of so many tokens, and the token that follows it.

    A window's last token does not count where the next ones do, nor does one beside padding.
    """
    shape, mask = written(batch).shape[:2], token_mask(batch)
    if tokens != (shape.numel() if mask is None else int(mask.sum())):  # a row for each sequence
        return torch.arange(tokens), torch.arange(tokens), None
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
    counts = real
    if ids is not None:
        counts = real & F.pad(real[:, 1:], (0, 1))
    window = torch.arange(len(real))[:, None].expand_as(real)[counts]
    labels = None if ids is None else F.pad(ids[:, 1:].cpu(), (0, 1))[counts]
    return window, counts[real].nonzero().squeeze(1), labels


def _costs(p: Signal, q: Signal, rows: Tensor, labels: Tensor | None) -> Tensor:
    """[rows, 3 or 5] float64 of these tokens: 1, the KL, whether both think the same token likeliest, both losses."""
    at = rows.to(p.values.device)
    both = [signal.logits(signal.values[at]).log_softmax(-1) for signal in (p, q)]
    columns = [torch.ones(len(at)), kl_of(*both), both[0].argmax(-1) == both[1].argmax(-1)]
    if labels is not None:
        columns += [-values.gather(1, labels.to(at)[:, None]).squeeze(1) for values in both]
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def summary_of(rows: Tensor, windows: int, has_head: bool, has_loss: bool) -> Comparison:
    """The means, and their intervals, of what windows cost.

    rows [windows, 3 or 5] float64: each window's tokens, and sums over them of KL, agreement and both losses.
    """
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
