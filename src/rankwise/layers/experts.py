"""Mixtures of experts: from stacked 3-D parameters to one linear layer per expert and matrix, and back.

transformers stores the experts of a layer as `gate_up_proj` (or `up_proj`) and `down_proj` [experts, out, in], which no walk
over linear layers finds. Unstacked, every expert's matrix is a linear layer like any other: it has its own activations
(those of the tokens routed to it) and its own rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

STACKED = ("gate_up_proj", "up_proj", "down_proj")


def is_stacked(module: nn.Module) -> bool:
    """Whether `module` holds experts in the stacked form of transformers 5."""
    stacks = [p for n, p in module.named_parameters(recurse=False) if n in STACKED]
    return len(stacks) == 2 and all(p.ndim == 3 for p in stacks) and hasattr(type(module), "_apply_gate")


def list_name(parameter: str) -> str:
    """The module list that replaces a stacked parameter; no loader's rename pattern matches it."""
    return parameter.removesuffix("_proj") + "_matrices"


class UnstackedExperts(nn.Module):
    """The eager forward of an experts module whose matrices are lists of linear layers.

    Mixed into the original class, whose activation, gate and routing conventions it keeps.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k] experts of each token, [tokens, k] their weights -> [tokens, hidden]."""
        module: Any = self
        inner = module.gate_up_matrices if module.has_gate else module.up_matrices
        activate = module._apply_gate if module.has_gate else module.act_fn
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= module.num_experts:
                continue  # a router's mark for "no expert"
            token, position = torch.where(top_k_index == expert)
            y = module.down_matrices[expert](activate(inner[expert](hidden_states[token])))
            if module.has_post_expert_norm:
                y = module.post_expert_norm(y)
            y = y * top_k_weights[token, position, None]
            result = result.index_add(0, token, y.to(result.dtype))
        return result


@functools.cache
def _unstacked_class(original: Any) -> Any:
    return type(f"Unstacked{original.__name__}", (UnstackedExperts, original), {})


def unstack(module: nn.Module) -> None:
    """Replace the stacked parameters of an experts module by lists of `nn.Linear`, in place; works on the meta device too."""
    experts: Any = module
    for name in [n for n in STACKED if isinstance(getattr(module, n, None), nn.Parameter)]:
        stack, trained = getattr(module, name).data, getattr(module, name).requires_grad
        bias: Tensor | None = getattr(module, f"{name}_bias").data if experts.has_bias else None
        weights = stack.transpose(1, 2) if experts.is_transposed else stack
        layers = []
        for e, weight in enumerate(weights):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
            if bias is not None:
                layer.bias = nn.Parameter(bias[e].clone(), requires_grad=trained)
            layers.append(layer)
        delattr(module, name)
        if bias is not None:
            delattr(module, f"{name}_bias")
        module.add_module(list_name(name), nn.ModuleList(layers))
    experts._is_hf_initialized = True  # transformers would initialise the parameters that this class had
    original: Any = type(module)
    module.__class__ = _unstacked_class(original)


def stacked_shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The shapes of the stacked parameters that `unstack` took apart: name -> [experts, ...]."""
    experts: Any = module
    shapes = {}
    for name in [n for n in STACKED if hasattr(module, list_name(n))]:
        layers = getattr(experts, list_name(name))
        out_features, in_features = layers[0].out_features, layers[0].in_features
        rows, columns = (in_features, out_features) if experts.is_transposed else (out_features, in_features)
        shapes[name] = (len(layers), rows, columns)
    return shapes


def restack(module: nn.Module) -> None:
    """Undo `unstack`, in place: the lists of linear layers become stacked parameters again."""
    experts: Any = module
    for name in [n for n in STACKED if hasattr(module, list_name(n))]:
        layers = getattr(experts, list_name(name))
        trained = layers[0].weight.requires_grad
        stack = torch.stack([layer.weight.detach() for layer in layers])
        stack = stack.transpose(1, 2).contiguous() if experts.is_transposed else stack
        delattr(module, list_name(name))
        module.register_parameter(name, nn.Parameter(stack, requires_grad=trained))
        if experts.has_bias:
            bias = torch.stack([layer.bias.detach() for layer in layers])
            module.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=trained))
    module.__class__ = type(module).__mro__[2]  # [unstacked, UnstackedExperts, original, ...]
