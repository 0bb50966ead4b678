"""vLLM serves a compressed folder: its plugin, found by the entry point `vllm.general_plugins`. Importing it is the registration.

vLLM joins q, k and v, and gate and up, into one layer whose parts have ranks of their own or are dense. Such a layer holds, part
after part,
    first   the first factors        second  the second factors
    order   of pivoted parts: as of their layers (`layers/lowrank.py`)
    weight  the dense parts; where the guards of the others arrive, too, and are dropped
Split over devices, a layer that is split by outputs keeps its rows of `second`, or where rows are pivots its part of `order` and
all of `second`; one split by inputs its columns of `first`: partial sums commute with `second`. Written against vLLM 0.32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
from rankwise.layers.lowrank import ColumnPivotedLinear, RowPivotedLinear, layer_class

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
        if checked.sizes:
            raise ValueError("vLLM does not run a folder whose MLPs have fewer neurons: rankwise densify writes one that it runs")
        if checked.bits:
            raise ValueError("vLLM does not run a folder with matrices of few bits: rankwise densify writes one that it runs")
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
        self.ranks, self.form, self.joined = ranks, form, joined

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
        columns = input_size_per_partition
        splits = output_size // sum(outs)
        replicas = [getattr(layer, "num_kv_head_replicas", 1) if part else 1 for part in range(len(outs))]
        layer.parts = [
            Part(
                rank or 0,
                out,
                columns,
                out * splits // copies,
                _pivots(self.form, out * splits // copies, input_size) if rank else "",
            )
            for rank, out, copies in zip(self.ranks, outs, replicas, strict=True)
        ]
        if columns != input_size and any(part.pivots == "columns" for part in layer.parts):
            raise RankwiseError(
                f"{layer.prefix}: a layer that is split by its inputs and has more outputs than inputs is served on one device "
                "only: compress with --form pair"
            )
        names = {"first.weight": params_dtype, "second.weight": params_dtype, "order": torch.int32, "weight": params_dtype}
        for (name, dtype), shapes in zip(names.items(), zip(*(part.shapes() for part in layer.parts), strict=True), strict=True):
            parameter = nn.Parameter(torch.empty(sum(map(math.prod, shapes)), dtype=dtype), requires_grad=False)
            parameter.weight_loader = _loader(layer, shapes)  # type: ignore[attr-defined]
            path, _, leaf = name.rpartition(".")
            if path:
                layer.add_module(path, nn.Module())
            layer.get_submodule(path).register_parameter(leaf, parameter)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., sum of outs]."""
        parts, held = layer.parts, (layer.first.weight, layer.second.weight, layer.order, layer.weight)
        tensors = [
            [own.view(shape) for own, shape in zip(parameter.split([*map(math.prod, shapes)]), shapes, strict=True)]
            for parameter, shapes in zip(held, zip(*(part.shapes() for part in parts), strict=True), strict=True)
        ]
        kept: list[Tensor | None] = [None] * len(parts)
        if all(part.pivots != "columns" for part in parts):  # then one product serves all
            kept = [*F.linear(x, layer.first.weight.view(-1, x.shape[-1])).split([part.rank for part in parts], -1)]
        ys = [part.product(x, inner, *own) for part, inner, *own in zip(parts, kept, *tensors, strict=True)]
        y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Part:
    """One matrix of a layer on this device: its rank (0: dense), its outputs and inputs here, its outputs on all devices, and
    what its pivots are: "rows", "columns" or "" where there are none."""

    rank: int
    out: int
    columns: int
    whole_out: int
    pivots: str

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what it holds of the layer's first, second, order and weight."""
        r, m, n = self.rank, self.out, self.columns
        if not r:
            return (0, n), (0, 0), (0,), (m, n)
        if self.pivots == "columns":
            return (r, n - r), (m, r), (n,), (0, n)
        if self.pivots == "rows":
            return (r, n), (self.whole_out - r, r), (m,), (0, n)
        return (r, n), (m, r), (0,), (0, n)

    def product(self, x: Tensor, kept: Tensor | None, first: Tensor, second: Tensor, order: Tensor, weight: Tensor) -> Tensor:
        """[..., in] -> [..., out]; kept: the product with `first`, where it is known."""
        if not self.rank:
            return F.linear(x, weight)
        if self.pivots == "columns":
            pivots, others = x.index_select(-1, order).tensor_split([self.rank], -1)
            return F.linear(pivots + F.linear(others, first), second)
        kept = F.linear(x, first) if kept is None else kept
        y = F.linear(kept, second)
        return torch.cat([kept, y], -1).index_select(-1, order) if self.pivots else y


def _pivots(form: str, out_features: int, in_features: int) -> str:
    kinds: dict[Any, str] = {RowPivotedLinear: "rows", ColumnPivotedLinear: "columns"}
    return kinds.get(layer_class(form, out_features, in_features), "")


def _loader(layer: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
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
