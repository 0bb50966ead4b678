"""How much of a text goes through a model at once: what fits in memory there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankwise.calibration.signal import PROBE, device_of, frozen, signal_of
from rankwise.calibration.tokens import TOKENS_PER_BATCH, Batch, vocabulary_of
from rankwise.layers.linear import is_linear, weight_of

WORKING_MEMORY = 2**31  # bytes that a batch may take on the host; of a GPU a quarter of what is free


def batches_of(model: Any, windows: Tensor) -> list[Batch]:
    """The windows [windows, length] as inputs of `model`: 8192 tokens to a batch where they fit, else fewer. An encoder-decoder
    reads every window on both sides."""
    names = ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    probe = dict.fromkeys(names, windows[:1, :PROBE])
    per_batch = max(1, min(TOKENS_PER_BATCH, tokens_at_once(model, probe)) // windows.shape[1])
    return [dict.fromkeys(names, part) for part in windows.split(per_batch)]


def first_tokens(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """The first sequences, about so many tokens in all; a longer one is cut where all its inputs are of one shape."""
    few: list[Batch] = []
    for batch in batches:
        if tokens <= 0:
            break
        first = next(iter(batch.values()))
        length = first.shape[1] if first.ndim > 1 else 1
        part = {name: tensor[: max(1, tokens // length)] for name, tensor in batch.items()}
        if length > tokens and all(tensor.shape == first.shape for tensor in batch.values()):
            part = {name: tensor[:, :tokens] for name, tensor in part.items()}
        few.append(part)
        tokens -= length * len(next(iter(part.values())))
    return few


def tokens_at_once(model: Any, probe: Batch) -> int:
    """How many tokens fit in a pass forward and back through the masked model: the inputs, outputs and components of every
    matrix, half as much again for what is between them, and the logits of models that give them in one piece only."""
    device, numbers = device_of(model), numbers_of_a_token(model)
    if device.type != "meta":  # of a model that is not in memory logits are made window by window
        with frozen(model), torch.no_grad():
            signal = signal_of(model, probe)
        if signal.head is None and signal.categorical:
            numbers += 6 * vocabulary_of(model)
    return int(room_for_a_batch(device) / (4 * numbers))


def numbers_of_a_token(model: Any, of_components: int = 2) -> float:
    """How many numbers a pass forward and back keeps of a token, its logits apart; `of_components` for each component, two where
    the model is masked."""
    weights = [weight_of(module) for module in model.modules() if is_linear(module)]
    return 1.5 * sum(sum(weight.shape) + of_components * min(weight.shape) for weight in weights)


def room_for_a_batch(device: torch.device) -> float:
    """Bytes that a batch may take."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else WORKING_MEMORY
