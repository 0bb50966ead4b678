"""How much of a text goes through a model at once, what fits in memory there; and whether it goes through at all."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.calibration.signal import PROBE, call, device_of, frozen, signal_of, values_of
from rankwise.calibration.tokens import TOKENS_PER_BATCH, Batch, cut, vocabulary_of, written
from rankwise.errors import RankwiseError, is_out_of_memory, reason
from rankwise.layers.linear import is_linear, weight_of
from rankwise.layers.precision import widened

WORKING_MEMORY = 3 * 2**29  # bytes that a batch may take on the host; of a GPU a quarter of what is free
SECOND = 16_000  # numbers of a sound


def batches_of(model: Any, windows: Tensor) -> list[Batch]:
    """The windows [windows, length] as inputs of `model`: 8192 tokens to a batch where they fit, else fewer."""
    names = sides(model)
    probe = dict.fromkeys(names, windows[:1, :PROBE])
    per_batch = max(1, min(TOKENS_PER_BATCH, tokens_at_once(model, probe)) // windows.shape[1])
    return [dict.fromkeys(names, part) for part in windows.split(per_batch)]


def sides(model: Any) -> list[str]:
    """The names of the inputs that read a window: an encoder-decoder reads it on both sides."""
    return ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]


def first_tokens(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """The first sequences, about so many tokens in all: a last one of which less than half is wanted is left out, a longer one
    cut where all its inputs are of one shape."""
    few: list[Batch] = []
    for batch in batches:
        first = written(batch)
        length = first.shape[1] if first.ndim > 1 else 1
        if few and 2 * tokens < length:
            break
        part = cut(batch, slice(max(1, tokens // length)))
        if length > tokens and all(tensor.shape == first.shape for tensor in batch.values()):
            part = {name: tensor[:, :tokens] for name, tensor in part.items()}
        few.append(part)
        tokens -= length * len(written(part))
    return few


def made_up(model: Any) -> Batch:
    """A small batch of the kind that the model says it reads. The model may want another all the same."""
    config, ids = model.config, torch.ones(1, PROBE, dtype=torch.int64)
    vision = getattr(config, "vision_config", config)
    others = {
        "pixel_values": lambda: (getattr(vision, "num_channels", 3), *2 * (vision.image_size,)),
        "input_features": lambda: (config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: (SECOND,),
    }
    name = model.main_input_name
    batch = {name: torch.zeros(1, *others[name](), dtype=model.dtype) if name in others else ids}
    return batch | {"decoder_input_ids": ids} if config.is_encoder_decoder else batch


@torch.no_grad()
def refuse_unfit(model: nn.Module, batch: Batch) -> None:
    """Raises `RankwiseError` for a model that does not run on the first two sequences of `batch`, or answers with nothing that
    can be compared. One that is not in memory is not tried."""
    if device_of(model).type == "meta":
        return
    first = cut(batch, slice(2))
    try:
        with frozen(model), widened(model):
            values_of(model, first)
    except RankwiseError:
        raise
    except Exception as error:  # a model fails in as many ways as there are
        if is_out_of_memory(error):
            raise
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in first.items())
        name = type(model).__name__
        raise RankwiseError(f"{name} does not run on {shapes}, of the calibration: {reason(error)}") from None


def refuse_without_gradients(model: nn.Module, matrices: Iterable[str]) -> None:
    """Raises `RankwiseError` for a model that runs all of these matrices with gradients switched off, as one does whose backward
    pass is its own."""
    seen: list[bool] = []
    with frozen(model), torch.enable_grad(), ExitStack() as stack:
        for name in matrices:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
            stack.callback(hook.remove)
        try:
            call(model, made_up(model))
        except Exception:  # it wants another batch
            return
    if seen and not any(seen):
        raise RankwiseError(
            f"{type(model).__name__} has a backward pass of its own, which hides the gradients of masks: choose an allocation "
            "and a decomposition that need none (uniform and whitened)"
        )


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
