"""How the original and the compressed model go on from the same few prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.calibration.signal import token_mask
from rankwise.calibration.tokens import Batch
from rankwise.errors import reason
from rankwise.evaluation.generation import continuations
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
            with student.as_original():
                original = continuations(model, prompts, new)
            with student.with_masks(masks):
                compressed = continuations(model, prompts, new)
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
