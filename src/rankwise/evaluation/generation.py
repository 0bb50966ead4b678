"""Greedy continuations of the same prompts by the original and the compressed model: does it still write?

Perplexity is measured on given text; a damaged model may follow that well and yet repeat itself as soon as it writes on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.calibration.own_text import generated
from rankwise.calibration.tokens import window_length
from rankwise.errors import RankwiseError

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 64
NGRAM = 4


def prompts_of(windows: Tensor) -> list[Tensor]:
    """The first tokens of up to 8 windows [windows, length], spread evenly over them: always the same ones."""
    chosen = torch.linspace(0, len(windows) - 1, min(PROMPTS, len(windows))).long()
    return list(windows[chosen, : min(PROMPT_TOKENS, windows.shape[1] // 2)])


def tokenised(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Tensor]:
    """The prompts [length] int64. Raises `RankwiseError` for an empty one and for one that leaves no room in the context."""
    found, context = [torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long) for prompt in prompts], window_length(model)
    for prompt, ids in zip(prompts, found, strict=True):
        if not 0 < len(ids) < context:
            raise RankwiseError(f"the prompt {prompt[:40]!r} has {len(ids)} tokens: between 1 and {context - 1} can be continued")
    return found


def continuations(model: Any, prompts: Tensor, limit: int) -> list[list[int]]:
    """The tokens that the model finds most likely after each of the `prompts` [prompts, length] int64, one after another: `limit`
    at most, or up to the end of text, which is not among them."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    written = generated(model, prompts, max_new_tokens=limit, eos_token_id=ends or None)
    rows = written[:, prompts.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """1 - (distinct n-grams) / (n-grams): rep-n (Welleck et al. 2020, arXiv 1908.04319); 0 where there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def generations(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tensor]
) -> dict[str, Any]:
    """Each prompt's text and its continuations, and means over prompts: length, repetition, and the tokens that the compressed
    model's has in common with the original's from the start. `models` are "reference" and "compressed"."""
    samples: list[dict[str, Any]] = []
    for prompt in prompts:
        limit = min(NEW_TOKENS, *(window_length(model) - len(prompt) for model in models.values()))
        written = {kind: continuations(model, prompt[None], limit)[0] for kind, model in models.items()}
        sample: dict[str, Any] = {"prompt": tokenizer.decode(prompt.tolist())}
        for kind, tokens in written.items():
            sample[kind] = {"text": tokenizer.decode(tokens), "tokens": len(tokens), "repetition": repetition(tokens)}
        samples.append(sample | {"common_prefix": common_prefix(written["reference"], written["compressed"])})
    means = {key: {kind: fmean(s[kind][key] for s in samples) for kind in models} for key in ("tokens", "repetition")}
    return {**means, "common_prefix": fmean(s["common_prefix"] for s in samples), "new_tokens": NEW_TOKENS, "samples": samples}
