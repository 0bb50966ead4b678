"""Which modules hold a weight matrix, and how to read it: `nn.Linear`, and GPT-2's `Conv1D`, stored transposed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SAME = {"FalconLinear"}  # their forward does what nn.Linear's does, in another order


def holds_matrix(module: nn.Module) -> bool:
    """Whether `module` is linear by its class; what it computes may be more."""
    return isinstance(module, nn.Linear | Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps x to W x + b with a weight of its own, and does nothing else."""
    forward, name = type(module).forward, type(module).__name__
    return holds_matrix(module) and (forward in (nn.Linear.forward, Conv1D.forward) or name in SAME)


def weight_of(module: nn.Module) -> Tensor:
    """The weight matrix [out_features, in_features] of a linear module, or [rows, features] of an embedding: a view, not a
    copy."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [out_features] of a linear module, or None."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def dense_linear(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """A linear module of the weight [out_features, in_features]: an `nn.Linear`, or a `Conv1D` where it is to be `transposed`."""
    if transposed:
        module: nn.Module = Conv1D(*weight.shape)
        module.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module


def empty_like(module: nn.Module, out_features: int, in_features: int) -> nn.Module:
    """A linear module of the same class with other sides, on the meta device, without values."""
    if isinstance(module, Conv1D):
        with torch.device("meta"):
            return Conv1D(out_features, in_features).to(module.weight.dtype)
    return nn.Linear(in_features, out_features, bias_of(module) is not None, device="meta", dtype=weight_of(module).dtype)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` (path -> module) into `model`, and the originals back on leaving, whatever happens inside."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def tensors_in(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor of the modules, under the module's name and its own; one that several share under the first's."""
    every = {f"{path}.{name}": tensor for path, module in modules.items() for name, tensor in module.state_dict().items()}
    first = {tensor.data_ptr(): name for name, tensor in reversed(every.items())}
    return {name: tensor for name, tensor in every.items() if not tensor.numel() or first[tensor.data_ptr()] == name}


def with_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Copies of the modules that hold what `tensors_in` gave of others like them."""
    copies = copy.deepcopy(dict(modules))
    for name, tensor in tensors_in(copies).items():
        tensor.copy_(tensors[name])
    return copies
