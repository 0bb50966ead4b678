"""How the original and the compressed model go on from the same few prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rankwise.calibration.signal import device_of, token_mask
from rankwise.calibration.tokens import Batch
from rankwise.errors import reason
from rankwise.masks.layers import Masks
from rankwise.masks.student import Student

logger = logging.getLogger(__name__)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 48, 40


def sample_texts(
    student: Student, masks: Masks, batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase | None
) -> list[dict[str, Any]]:
    """Greedy texts of both models, a record per prompt; the prompts are the first tokens of the first windows in `batches`.

    prompt, original, compressed: text. tokens: how many the original wrote; same_tokens: how many from the start are the same.
    Empty for a model that does not generate text, without a tokenizer, and for windows too short to go on from.
    """
    model: Any = student.model
    batch = batches[0]
    ids = batch.get("input_ids")
    writes = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
    if not writes or tokenizer is None or ids is None or token_mask(batch) is not None or ids.shape[1] < 4:
        return []
    length = min(PROMPT_TOKENS, ids.shape[1] // 2)
    prompts, new = ids[:PROMPTS, :length], min(NEW_TOKENS, ids.shape[1] - length)
    try:
        with student.frozen():
            original = _continued(model, prompts, new, student.as_original())
            compressed = _continued(model, prompts, new, student.with_masks(masks))
    except Exception as error:  # models generate in as many ways as there are; none is worth losing the result
        logger.warning("no sample texts: %s", reason(error))
        return []
    records = []
    for prompt, a, b in zip(prompts.tolist(), original, compressed, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        texts = {"prompt": prompt, "original": a, "compressed": b}
        decoded = {name: tokenizer.decode(tokens, skip_special_tokens=True) for name, tokens in texts.items()}
        records.append({**decoded, "tokens": len(a), "same_tokens": same})
    return records


def _continued(model: Any, prompts: Tensor, new: int, inside: AbstractContextManager[None]) -> list[list[int]]:
    """The most likely next tokens, one after the other, up to the end of the text: a list per prompt [prompts, length]."""
    own = model.generation_config
    ends = own.eos_token_id if own is not None else None
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    prompts = prompts.to(device_of(model))
    config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=ends or None)
    model.generation_config = config  # `generate` takes what the given one leaves open, as a penalty, from here
    try:
        with inside:
            written = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    finally:
        model.generation_config = own
    rows = written[:, prompts.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
