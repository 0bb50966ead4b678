"""The numbers that a model computes in, which may be wider than those it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

HALF = torch.bfloat16, torch.float16


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


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first of its parameters."""
    return next(model.parameters()).dtype


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model computes in `dtype` there. Nowhere in float16, whose range holds neither all hidden states nor small
    gradients. On a CPU in no half precision: without units for it that takes ten to thirty times as long as float32, with
    them half as long, to other ranks than on the machine beside it."""
    return dtype != torch.float16 and (device.type != "cpu" or dtype not in HALF)


def to_float32(model: nn.Module, which: Callable[[Tensor], bool] = lambda _: True) -> Callable[[], None]:
    """Have the model compute in float32 with its tensors in half precision, or those of them that `which` names.

    The function that is returned puts them back: exactly, what was not changed in between.
    """
    half = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF and which(t)]
    for tensor, _ in half:
        tensor.data = tensor.data.float()

    def put_back() -> None:
        for tensor, dtype in half:
            tensor.data = tensor.data.to(dtype)

    return put_back


@contextmanager
def in_float32(*models: nn.Module, which: Callable[[Tensor], bool] = lambda _: True) -> Iterator[None]:
    """The models as `to_float32` leaves them while inside."""
    put_back = [to_float32(model, which) for model in models]
    try:
        yield
    finally:
        for undo in put_back:
            undo()


def widened(*models: nn.Module) -> AbstractContextManager[None]:
    """The models in float32 while inside, where their device does not compute in what they are stored in."""
    return in_float32(*models, which=lambda tensor: not computes_in(tensor.dtype, tensor.device))
