"""Stand-ins for the parts of vLLM 0.32 that the plugin touches, where vLLM is not installed (it brings gigabytes of CUDA).

Shortened from vllm/model_executor/{layers/linear.py, layers/quantization/__init__.py, layers/quantization/base_config.py,
models/utils.py} (Apache-2.0): the same names, signatures and order of calls, without kernels, logging and other quantizations.
`tests/test_vllm.py` passes with the real modules as well.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS: dict[str, type] = {}
WORLD = {"rank": 0, "size": 1}  # tensor parallel


def register_quantization_config(name: str) -> Any:
    def register(cls: type) -> type:
        METHODS[name] = cls
        return cls

    return register


def get_quantization_config(name: str) -> Any:
    return METHODS[name]


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        layer.weight = nn.Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition), requires_grad=False)
        layer.weight.output_dim, layer.weight.input_dim = 0, 1
        layer.weight.weight_loader = extra["weight_loader"]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    def _start(
        self, input_size: int, outs: list[int], columns: int, bias: bool, quant_config: Any, prefix: str, params_dtype: Any
    ) -> None:
        self.prefix = prefix
        self.quant_method = quant_config.get_quant_method(self, prefix) if quant_config else UnquantizedLinearMethod()
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=outs,
            input_size=input_size,
            output_size=self.output_size,
            params_dtype=params_dtype,
            weight_loader=self.weight_loader,
        )
        self.bias = nn.Parameter(torch.empty(sum(outs)), requires_grad=False) if bias else None
        if self.bias is not None:
            self.bias.output_dim, self.bias.weight_loader = 0, self.weight_loader

    tp_rank = property(lambda self: WORLD["rank"])
    tp_size = property(lambda self: WORLD["size"])


class ColumnParallelLinear(LinearBase):
    output_sizes: list[int]  # of joined layers

    def __init__(self, input_size: int, output_size: int, bias: bool = True, params_dtype: Any = None, **names: Any) -> None:
        super().__init__()
        self.output_size = output_size
        outs = [size // self.tp_size for size in getattr(self, "output_sizes", [output_size])]
        self._start(input_size, outs, input_size, bias, names["quant_config"], names["prefix"], params_dtype)

    def weight_loader(self, parameter: Any, loaded: Tensor, shard_id: Any = None) -> None:
        offset, size, rank = self.place(shard_id)
        parameter.data.narrow(0, offset, size).copy_(loaded.narrow(0, rank * size, size))

    def place(self, shard_id: Any) -> tuple[int, int, int]:
        return 0, self.output_size // self.tp_size, self.tp_rank

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, x, self.bias), None

    def load_joined(self, weights: Any) -> Any:
        for name, loaded in weights:
            shard_id = getattr(loaded, "shard_id", None)
            owner, _, attribute = name.rpartition(".")
            parameter = getattr(self.get_submodule(owner), attribute, self)
            parameter.weight_loader(parameter, loaded, shard_id)
            yield name


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_sizes: list[int], **options: Any) -> None:
        nn.Module.__init__(self)
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), **options)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value) if name == "output_sizes" else super().__setattr__(name, value)

    def place(self, shard_id: int) -> tuple[int, int, int]:
        size = self.tp_size
        return sum(self.output_sizes[:shard_id]) // size, self.output_sizes[shard_id] // size, self.tp_rank

    load_weights = ColumnParallelLinear.load_joined


class QKVParallelLinear(MergedColumnParallelLinear):
    def __init__(self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, **options: Any) -> None:
        nn.Module.__init__(self)
        size = WORLD["size"]
        self.num_kv_head_replicas = max(1, size // total_num_kv_heads)
        kv = head_size * max(1, total_num_kv_heads // size) * size
        super().__init__(hidden_size, [total_num_heads * head_size, kv, kv], **options)

    def place(self, shard_id: str) -> tuple[int, int, int]:
        offset, size, rank = super().place("qkv".index(shard_id))
        return offset, size, rank if shard_id == "q" else rank // self.num_kv_head_replicas


class RowParallelLinear(LinearBase):
    def __init__(self, input_size: int, output_size: int, bias: bool = True, params_dtype: Any = None, **names: Any) -> None:
        super().__init__()
        self.output_size = output_size
        columns = input_size // self.tp_size
        self._start(input_size, [output_size], columns, bias, names["quant_config"], names["prefix"], params_dtype)

    def weight_loader(self, parameter: Any, loaded: Tensor) -> None:
        if hasattr(parameter, "input_dim"):
            size = parameter.shape[1]
            loaded = loaded.narrow(1, self.tp_rank * size, size)
        parameter.data.copy_(loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.quant_method.apply(self, x, None if self.tp_rank > 0 else self.bias), None


@dataclass
class WeightsMapper:
    orig_to_new_regex: dict[Any, str | None] = field(default_factory=dict)
    orig_to_new_stacked: dict[str, tuple[str, Any]] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return WeightsMapper(
            {**self.orig_to_new_regex, **other.orig_to_new_regex},
            {**self.orig_to_new_stacked, **other.orig_to_new_stacked},
            {**self.orig_to_new_prefix, **other.orig_to_new_prefix},
        )

    def map(self, key: str) -> tuple[str, Any]:
        for pattern, new in self.orig_to_new_regex.items():
            key = pattern.sub(new, key)
        shard_id = None
        for part, (new, shard) in self.orig_to_new_stacked.items():
            if part in key:
                key, shard_id = key.replace(part, new, 1), shard
        for prefix, new in self.orig_to_new_prefix.items():
            if key.startswith(prefix):
                key = key.replace(prefix, str(new), 1)
        return key, shard_id

    def apply(self, weights: Any) -> Any:
        for name, data in weights:
            new, shard_id = self.map(name)
            if shard_id is not None:
                data.shard_id = shard_id
            yield new, data

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self.map(name)[0]: value for name, value in values.items()}

    def get_rename_mapper(self) -> WeightsMapper:
        return WeightsMapper(self.orig_to_new_regex, {}, self.orig_to_new_prefix)


class AutoWeightsLoader:
    def __init__(self, module: Any) -> None:
        self.module = module

    def load_weights(self, weights: Any, mapper: WeightsMapper) -> set[str]:
        mapper |= self.module.quant_config.get_checkpoint_weight_mapper()
        loaded = set()
        for name, data in mapper.apply(weights):
            path = name.rpartition(".")[0]
            while path and not hasattr(self._module(path), "load_weights"):
                path = path.rpartition(".")[0]
            if path:
                list(self._module(path).load_weights([(name.removeprefix(f"{path}."), data)]))
            else:
                parameter = dict(self.module.named_parameters())[name]
                parameter.weight_loader(parameter, data)
            loaded.add(name)
        return loaded

    def _module(self, path: str) -> Any:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            return None


def install() -> None:
    """Put the stand-ins where vLLM's modules would be."""
    layers, models = "vllm.model_executor.layers", "vllm.model_executor.models"
    linear = (LinearBase, LinearMethodBase, UnquantizedLinearMethod, QKVParallelLinear, MergedColumnParallelLinear)
    contents: dict[str, tuple[Any, ...]] = {
        f"{layers}.linear": (*linear, RowParallelLinear, ColumnParallelLinear),
        f"{layers}.quantization": (register_quantization_config, get_quantization_config),
        f"{layers}.quantization.base_config": (QuantizationConfig,),
        f"{models}.utils": (WeightsMapper, AutoWeightsLoader),
    }
    for path in ("vllm", "vllm.model_executor", layers, models, *contents):
        module = types.ModuleType(path)
        module.__path__ = []
        for thing in contents.get(path, ()):
            setattr(module, thing.__name__, thing)
        sys.modules[path] = module
