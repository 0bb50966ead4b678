"""Mixtures of experts: from stacked parameters to one linear layer per expert and matrix, and back.

transformers stores the experts of a layer as `gate_up_proj` (or `up_proj`) and `down_proj` [experts, out, in], which no walk
over linear layers finds. Unstacked, every expert's matrix is a linear layer like any other: it has its own activations
(those of the tokens routed to it) and its own rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

# what transformers' decorator has given to every experts module, all alike, since its release 5.14
DECORATED = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


class UnstackedExperts(nn.Module):
    """The eager forward of an experts module whose matrices are lists of linear layers.

    Mixed into the original class, whose activation, gate and routing conventions it keeps.
    """

    flat = False  # whether the first two axes of a stack are one: [experts * rows, columns]
    has_bias = has_post_expert_norm = False

    def lists(self) -> dict[str, str]:
        """Stacked parameter -> the module list that replaces it; no loader's rename pattern matches it."""
        inner = "gate_up" if getattr(self, "has_gate", True) else "up"
        return {f"{inner}_proj": f"{inner}_matrices", "down_proj": "down_matrices"}

    def turned(self, name: str) -> bool:
        """Whether the stack of this name holds its matrices as [in, out]."""
        return bool(getattr(self, "is_transposed", False))

    def apply_expert(self, expert: int, x: Tensor) -> Tensor:
        """What an expert makes of its tokens: [tokens, hidden] -> [tokens, hidden]."""
        module: Any = self
        inner = module.gate_up_matrices if module.has_gate else module.up_matrices
        activate = module._apply_gate if module.has_gate else module.act_fn
        y: Tensor = module.down_matrices[expert](activate(inner[expert](x)))
        return module.post_expert_norm(y) if module.has_post_expert_norm else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k] experts of each token, [tokens, k] their weights -> [tokens, hidden]."""
        module: Any = self
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= len(module.down_matrices):
                continue  # a router's mark for "no expert"
            token, position = torch.where(top_k_index == expert)
            y = self.apply_expert(expert, hidden_states[token]) * top_k_weights[token, position, None]
            result = result.index_add(0, token, y.to(result.dtype))
        return result


class UnstackedLlama4(UnstackedExperts):
    """Llama 4's experts, each of which is handed every token times its weight: zeros where it is not chosen."""

    has_gate = True

    def turned(self, name: str) -> bool:
        return True

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        module: Any = self
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = up * module.act_fn(gate)
        return product

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # as the original's
        """[experts * tokens, hidden], sorted by expert -> the same."""
        count = len(self.down_matrices)  # type: ignore[arg-type]  # a module list
        of_each = len(hidden_states) // count
        expert = torch.arange(count, device=hidden_states.device).repeat_interleave(of_each)
        chosen = expert.where(hidden_states.any(-1), count)[:, None]
        return super().forward(hidden_states, chosen, torch.ones_like(hidden_states[:, :1]))


class UnstackedDbrx(UnstackedExperts):
    """DBRX's experts: gate and up apart, and three flat stacks in a module within."""

    flat = True

    def lists(self) -> dict[str, str]:
        return {"mlp.w1": "gate_matrices", "mlp.v1": "up_matrices", "mlp.w2": "down_matrices"}

    def turned(self, name: str) -> bool:
        return name == "mlp.w2"

    def apply_expert(self, expert: int, x: Tensor) -> Tensor:
        module: Any = self
        gate = module.mlp.activation_fn(module.gate_matrices[expert](x))
        y: Tensor = module.down_matrices[expert](gate * module.up_matrices[expert](x))
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of `UnstackedExperts`, for hidden states [sequences, length, hidden]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(tokens, top_k_index, top_k_weights).view_as(hidden_states)


KINDS: dict[str, type[UnstackedExperts]] = {"Llama4TextExperts": UnstackedLlama4, "DbrxExperts": UnstackedDbrx}


def _kind(module: nn.Module) -> type[UnstackedExperts] | None:
    decorated = UnstackedExperts if all(hasattr(module, name) for name in DECORATED) else None
    return KINDS.get(type(module).__name__, decorated)


def is_stacked(module: nn.Module) -> bool:
    """Whether `module` holds experts in a stacked form that `unstack` takes apart."""
    kind: Any = _kind(module)
    if kind is None:
        return False
    parameters, axes = dict(module.named_parameters()), 2 if kind.flat else 3
    return all(name in parameters and parameters[name].ndim == axes for name in kind.lists(module))


@functools.cache
def _unstacked_class(kind: Any, original: Any) -> Any:
    return type(f"Unstacked{original.__name__}", (kind, original), {})


def unstack(module: nn.Module) -> None:
    """Replace the stacked parameters of an experts module by lists of `nn.Linear`, in place, values or none."""
    kind: Any = _kind(module)
    original: Any = type(module)
    lists = {name: _linears(module, kind, name) for name in kind.lists(module)}
    for name, new in kind.lists(module).items():
        owner, leaf = _owner(module, name)
        delattr(owner, leaf)
        if lists[name][0].bias is not None:
            delattr(owner, f"{leaf}_bias")
        module.add_module(new, lists[name])
    module.__class__ = _unstacked_class(kind, original)


def _linears(module: Any, kind: Any, name: str) -> nn.ModuleList:
    """The matrices of a stack, each as a linear layer."""
    parameter = module.get_parameter(name)
    stack = parameter.data.unflatten(0, (module.num_experts, -1)) if kind.flat else parameter.data
    stack = stack.transpose(1, 2) if kind.turned(module, name) else stack
    has_bias = getattr(module, "has_bias", False)
    biases = module.get_parameter(f"{name}_bias").data if has_bias else [None] * len(stack)
    layers = nn.ModuleList()
    for weight, bias in zip(stack, biases, strict=True):
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=parameter.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=parameter.requires_grad)
        layers.append(layer)
    return layers


def stacked_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the stacked parameters that `unstack` took apart: name -> [experts, ...], or flat."""
    experts: Any = module
    shapes: dict[str, tuple[int, ...]] = {}
    for name, new in experts.lists().items():
        layers = getattr(experts, new)
        rows, columns = layers[0].out_features, layers[0].in_features
        rows, columns = (columns, rows) if experts.turned(name) else (rows, columns)
        shapes[name] = (len(layers) * rows, columns) if experts.flat else (len(layers), rows, columns)
    return shapes


def restack(module: nn.Module) -> None:
    """Undo `unstack`, in place: the lists of linear layers become stacked parameters again."""
    experts: Any = module
    for name, new in experts.lists().items():
        layers = getattr(experts, new)
        trained = layers[0].weight.requires_grad
        stack = torch.stack([layer.weight.detach() for layer in layers])
        stack = stack.transpose(1, 2).contiguous() if experts.turned(name) else stack
        stack = stack.flatten(0, 1) if experts.flat else stack
        delattr(module, new)
        owner, leaf = _owner(module, name)
        owner.register_parameter(leaf, nn.Parameter(stack, requires_grad=trained))
        if experts.has_bias:
            bias = torch.stack([layer.bias.detach() for layer in layers])
            owner.register_parameter(f"{leaf}_bias", nn.Parameter(bias, requires_grad=trained))
    module.__class__ = type(module).__bases__[1]  # the original


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter of this name is in, and its name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
