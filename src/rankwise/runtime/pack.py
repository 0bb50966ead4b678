"""Faster bfloat16 on a CPU: weights lie in memory in the order in which oneDNN's kernels read them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import RankwiseError
from rankwise.runtime.optimize import JointLinear


class PackedLinear(nn.Linear):
    """A linear layer whose weight [out_features, in_features] is oneDNN's own, blocked; its checkpoint has the plain one."""

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        """`layer`, packed."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), None)
        made.weight = nn.Parameter(packed, requires_grad=False)
        made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if x.requires_grad and torch.is_grad_enabled():  # somebody trains what comes before
            return F.linear(x, self.weight.to_dense(), self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().to_dense()


def has_kernels() -> bool:
    """Whether this processor and this build of torch multiply packed bfloat16 weights."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: Any) -> Any:
    """Pack the weights of all linear layers, factors and dense ones, for inference in bfloat16 on a CPU, in
    place, and return the model.

    Nothing is approximated; memory and checkpoint stay what they are. Do it last: packed weights cannot be moved or cast, which
    stops with an error. Not for `torch.compile`, which cannot read these; inductor's `freezing` packs there. Weights that several
    layers share stay as they are. Raises `RankwiseError` for a model without bfloat16 layers on a CPU, and for a CPU that has no
    such kernels.
    """
    if not has_kernels():
        raise RankwiseError(
            "this processor or build of torch cannot multiply packed bfloat16 weights: run without pack",
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, JointLinear, PackedLinear)}
    found = {name: layer for name, layer in found.items() if layer.weight.dtype == torch.bfloat16 and layer.weight.is_cpu}
    if not found:
        raise RankwiseError(
            "this model has no linear layers in bfloat16 on a CPU: load it there with dtype='bfloat16'",
        )
    for name, layer in found.items():
        if type(layer) is not PackedLinear and uses[id(layer.weight)] == 1:
            model.set_submodule(name, PackedLinear.of(layer))
    return model
