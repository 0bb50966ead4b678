"""Text that a model writes itself: to be calibrated on, and the one way to have it write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from rankwise.calibration.batches import room_for_a_batch
from rankwise.calibration.signal import drawn
from rankwise.calibration.tokens import TOKENS_PER_BATCH, vocabulary_of
from rankwise.errors import RankwiseError
from rankwise.progress import progress


def refuse_mute(model: Any) -> None:
    """Raises `RankwiseError` for a model that does not write text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise RankwiseError(f"{type(model).__name__} cannot write its own calibration text: name one with calibration")


def own_windows(model: Any, length: int, samples: int, seed: int, opening: Sequence[int] = ()) -> Tensor:
    """Windows [samples, length] int64 that the model writes itself, at temperature 1 over the whole vocabulary and on past any
    end of text or of a turn; each from the model's first token, or a random one. With an `opening`, half of them are dialogues
    that begin so, in random order: a model for chat is asked for other text too, and both together serve either better than one
    alone.

    Raises `RankwiseError` for a model that does not generate text.
    """
    refuse_mute(model)
    generator = torch.Generator().manual_seed(seed)
    dialogues = samples // 2 if opening else 0
    prompts = _first_tokens(model, samples - dialogues, generator)
    if dialogues:  # the others get as far, so that all are written together
        others = _written(model, prompts, len(opening), generator)
        prompts = torch.cat((torch.tensor([list(opening)] * dialogues), others))
        prompts = prompts[torch.randperm(samples, generator=generator)]
    return _written(model, prompts, length, generator)


def _first_tokens(model: Any, samples: int, generator: torch.Generator) -> Tensor:
    """The prompts [samples, 1] int64: the model's first token, or random ones."""
    start, vocabulary = getattr(model.generation_config, "bos_token_id", None), vocabulary_of(model)
    if isinstance(start, int) and 0 <= start < vocabulary:
        return torch.full((samples, 1), start)
    return torch.randint(vocabulary, (samples, 1), generator=generator)


def _written(model: Any, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """The prompts [samples, tokens] written on to `length` tokens: [samples, length]."""
    if prompts.shape[1] >= length:
        return prompts
    times = math.ceil(len(prompts) * length / written_at_once(model, model.device))
    at_once = math.ceil(len(prompts) / times)  # as many each time
    draws = torch.rand(length - prompts.shape[1], len(prompts), generator=generator)  # the same however many are written at once
    parts = list(zip(prompts.split(at_once), draws.split(at_once, 1), strict=True))
    steps = iter(progress(range(len(parts) * len(draws)), "writing text"))

    def write(prompts: Tensor, draws: Tensor) -> Tensor:
        own = iter(draws)

        def draw(_: Tensor, scores: Tensor) -> Tensor:
            """Leave one token of each row, drawn by one random number. `generate` takes one for each word of the vocabulary: a
            fifth of the whole on a CPU."""
            next(steps, None)
            tokens = drawn(scores.float().log_softmax(-1), next(own))
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0)

        return generated(model, prompts, logits_processor=[draw], max_length=length).cpu()

    windows = torch.cat([write(*part) for part in parts])
    next(steps, None)  # it says that it is done
    return windows


@torch.no_grad()
def generated(model: Any, prompts: Tensor, logits_processor: Sequence[Any] = (), **settings: Any) -> Tensor:
    """The prompts [samples, tokens] int64 and what the model writes on, greedily: [samples, tokens and more]. settings: of
    transformers' `GenerationConfig`; the model's own ones, as an end of text or a penalty, count for nothing."""
    own = model.generation_config
    config = GenerationConfig(do_sample=False, pad_token_id=0, **settings)
    prompts = prompts.to(model.device)
    model.generation_config = config  # `generate` takes what the given one leaves open from here
    try:
        written: Tensor = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=config,
            logits_processor=LogitsProcessorList(logits_processor),
        )
    finally:
        model.generation_config = own
    return written


def written_at_once(model: Any, device: torch.device) -> int:
    """Tokens of the sequences that a model writes at once: as many as have room for their keys and values. On a GPU a token of
    many sequences takes as long as one's; on a CPU more than some number gain nothing."""
    fit = int(room_for_a_batch(device) / kept_of_a_token(model))
    return max(1, fit if device.type == "cuda" else min(4 * TOKENS_PER_BATCH, fit))


def kept_of_a_token(model: Any) -> float:
    """Bytes of its keys and values in float32."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = heads / (getattr(text, "num_key_value_heads", None) or heads)
    return 8 * getattr(text, "hidden_size", 1) * getattr(text, "num_hidden_layers", 1) / shared
