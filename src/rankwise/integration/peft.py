"""LoRA on a compressed model: which names to give PEFT.

PEFT adapts linear layers, so it adapts the factors of a low-rank layer, not the layer. An adapter on a factor merges into that
factor: the ranks stay, and the merged model is saved like any compressed one.
"""

from __future__ import annotations

from torch import nn

from rankwise.errors import RankwiseError
from rankwise.layers.linear import is_linear


def lora_targets(model: nn.Module, *names: str) -> list[str]:
    """For `LoraConfig(target_modules=...)`: the linear layers called `names` and, where one is low-rank, its two factors.

    names: as one writes for the dense model: "q_proj", "v_proj". Raises `RankwiseError` for a name that no linear layer has.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for path, module in model.named_modules():
        owner = path.removesuffix(".first").removesuffix(".second")
        for name in names:
            if is_linear(module) and f".{owner}".endswith(f".{name}"):
                found[name].append(path)
    for name, paths in found.items():
        if not paths:
            raise RankwiseError(f"no linear layer of {type(model).__name__} is called {name!r}")
    return [path for paths in found.values() for path in paths]
