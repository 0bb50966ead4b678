"""The numbers that a model computes in, which may be wider than those it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed for a model on `device`: Apple's GPU has none, so beside it on the host."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, where that is computed."""
    return tensor.to(exact_device(tensor.device), torch.float64)


def is_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite: told by the least and the largest, a tenth of the time of looking at each."""
    values = values.detach()
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def has_units_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies `dtype` itself. A CPU without such units takes ten to thirty times as long as in float32."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if dtype == torch.bfloat16 else ("_is_amx_fp16_supported",)
    return any(getattr(torch.cpu, name, bool)() for name in units)


def widen(model: nn.Module, device: torch.device | None = None) -> Callable[[], None]:
    """Have the model compute in float32 where `device` (the model's own) has no units for what its tensors are stored in.

    The function that is returned puts them back: exactly, what was not changed in between.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [(t, t.dtype) for t in tensors if not has_units_for(t.dtype, device or t.device)]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()

    def put_back() -> None:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)

    return put_back


@contextmanager
def widened(*models: nn.Module) -> Iterator[None]:
    """The models as `widen` leaves them while inside."""
    put_back = [widen(model) for model in models]
    try:
        yield
    finally:
        for undo in put_back:
            undo()
