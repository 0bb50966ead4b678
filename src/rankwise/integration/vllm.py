"""vLLM serves a compressed folder: its plugin, found by the entry point `vllm.general_plugins`. Importing it is the registration.

vLLM joins q, k and v, and gate and up, into one layer whose parts have ranks of their own or are dense. Such a layer holds
    first   [sum of ranks, in]       the first factors, one product for all parts
    second  [sum of rows * rank]     the second factors, one after the other
    order   [sum of outs]            of pivoted parts: where each row stands in [pivots, others]
    weight  [sum of dense outs, in]  the dense parts; where the guards of the others arrive, too, and are dropped
Split over devices, a column-parallel layer keeps its rows of a pair's `second`, or its part of `order` and all of a pivoted
`second`; a row-parallel one its columns of `first`: partial sums commute with `second`. Written against vLLM 0.32.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from rankwise.errors import RankwiseError
from rankwise.integration.quantizer import METHOD, RankwiseConfig
from rankwise.layers.lowrank import PivotedLinear

PARTS: dict[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}  # how a joined q, k and v names them; others number theirs


def register() -> None:
    """What vLLM calls in each of its processes, any number of times."""


@register_quantization_config(METHOD)
class RankwiseVllmConfig(QuantizationConfig):
    """Which linear layers of vLLM's model are low-rank."""

    def __init__(self, ranks: dict[str, int], form: str) -> None:
        super().__init__()
        self.ranks, self.form = ranks, form

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RankwiseVllmConfig:
        """Of a folder's `quantization_config`. Raises `RankwiseError` for compressed experts, ValueError for another format."""
        checked = RankwiseConfig.from_dict(config)
        if checked.experts:
            raise RankwiseError(
                "vLLM cannot serve compressed experts: compress with --exclude '*experts*', or densify the folder"
            )
        return cls(checked.ranks, checked.form)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # nothing but matrix products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """A bias belongs to a pair's `second` in a folder, to the layer in vLLM."""
        return WeightsMapper(orig_to_new_regex={re.compile(r"\.second\.bias$"): ".bias"})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename the layers as vLLM's model does."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Raises `RankwiseError` for a low-rank layer that is none of vLLM's linear layers (the output head)."""
        above, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf)
        ranks = [self.ranks.get(f"{above}.{part}".removeprefix(".")) for part in parts or [leaf]]
        if isinstance(layer, LinearBase):
            return LowRankMethod(ranks, self.form, joined=parts == [leaf]) if any(ranks) else UnquantizedLinearMethod()
        if any(ranks):
            raise RankwiseError(f"vLLM cannot serve {prefix} as a low-rank layer: compress without it, or densify the folder")
        return None


class LowRankMethod(LinearMethodBase):
    """The weights and the forward of a layer with one rank (None: dense) per part; `joined`: its parts are one matrix in the
    folder, too, in the same order (Phi-3)."""

    supports_pre_processed_weights = True

    def __init__(self, ranks: list[int | None], form: str, joined: bool = False) -> None:
        self.ranks, self.pivoted, self.joined = ranks, form == PivotedLinear.form, joined

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
        """Register `first`, `second`, `order` and `weight` of `layer`, each with a loader of its own."""
        outs = output_partition_sizes
        if len(outs) != len(self.ranks):
            if not self.joined or sum(outs) != output_size:
                raise RankwiseError(
                    f"{layer.prefix}: a layer of {len(outs)} parts that are one low-rank matrix in the folder is served on one "
                    "device only, and where vLLM's model says that it keeps their order: densify the folder"
                )
            outs = [output_size]
        columns, ranks = input_size_per_partition, [rank or 0 for rank in self.ranks]
        replicas = [getattr(layer, "num_kv_head_replicas", 1) if part else 1 for part in range(len(outs))]
        whole = [out * output_size // sum(outs) // copies for out, copies in zip(outs, replicas, strict=True)]
        rows = [out - rank for out, rank in zip(whole, ranks, strict=True)] if self.pivoted else outs
        layer.outs, layer.low_ranks, layer.rows = outs, ranks, rows

        def register(name: str, shapes: list[tuple[int, ...]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _loader(layer, shapes)  # type: ignore[attr-defined]
            path, _, leaf = name.rpartition(".")
            if path:
                layer.add_module(path, nn.Module())
            layer.get_submodule(path).register_parameter(leaf, parameter)

        firsts = [(rank, columns) for rank in ranks]
        seconds = [(of_part * bool(rank), rank) for of_part, rank in zip(rows, ranks, strict=True)]
        dense = [(0 if rank else out, columns) for out, rank in zip(outs, ranks, strict=True)]
        register("first.weight", firsts, (sum(ranks), columns), params_dtype)
        register("second.weight", seconds, (sum(of_part * rank for of_part, rank in seconds),), params_dtype)
        register("weight", dense, (sum(out for out, _ in dense), columns), params_dtype)
        if self.pivoted:
            orders = [(out * bool(rank),) for out, rank in zip(outs, ranks, strict=True)]
            register("order", orders, (sum(out for (out,) in orders),), torch.int32)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., sum of outs]."""
        ranks, outs, rows = layer.low_ranks, layer.outs, layer.rows
        inner = F.linear(x, layer.first.weight).split(ranks, -1)
        dense_outs = [0 if rank else out for out, rank in zip(outs, ranks, strict=True)]
        dense = F.linear(x, layer.weight).split(dense_outs, -1) if any(dense_outs) else ()
        seconds = layer.second.weight.split([of_part * rank for of_part, rank in zip(rows, ranks, strict=True)])
        orders = layer.order.split([out * bool(rank) for out, rank in zip(outs, ranks, strict=True)]) if self.pivoted else ()
        parts = []
        for i, rank in enumerate(ranks):
            if not rank:
                parts.append(dense[i])
                continue
            part = F.linear(inner[i], seconds[i].view(rows[i], rank))
            parts.append(torch.cat([inner[i], part], -1)[..., orders[i]] if self.pivoted else part)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias


def _loader(layer: Any, shapes: list[tuple[int, ...]]) -> Any:
    """The loader of a parameter that holds tensors of `shapes` one after the other: puts part `shard_id` in its place."""
    ends = list(accumulate(map(math.prod, shapes)))

    def load(parameter: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
        if loaded.numel() == 0:
            return  # a guard
        part: Any = PARTS.get(shard_id, shard_id)
        place = parameter.data.view(-1)[ends[part] - math.prod(shapes[part]) : ends[part]].view(shapes[part])
        replicas = layer.num_kv_head_replicas if shard_id in ("k", "v") else 1
        for axis, size in enumerate(place.shape):
            if loaded.shape[axis] == size * layer.tp_size // replicas:
                loaded = loaded.narrow(axis, layer.tp_rank // replicas * size, size)
        if loaded.shape != place.shape:
            raise RankwiseError(f"a weight of {layer.prefix} has shape {list(loaded.shape)}, expected {list(place.shape)}")
        place.copy_(loaded)

    return load
