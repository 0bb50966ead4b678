"""LoRA on a compressed model: which names to give PEFT.

PEFT adapts linear layers, so it adapts the factors of a low-rank layer, not the layer. An adapter on a factor merges into that
factor: the ranks stay, and the merged model is saved like any compressed one.
"""

from __future__ import annotations

from torch import nn

from rankwise.errors import RankwiseError
from rankwise.layers.linear import holds_matrix
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.quantised import QuantisedLinear


def lora_targets(model: nn.Module, *names: str) -> list[str]:
    """Return LoRA's `target_modules`: linear layers called `names`, or both factors of a low-rank one.

    names: as one writes for the dense model: "q_proj", "v_proj". Raises `RankwiseError` for a name that no linear layer has, and
    for layers of few bits, which PEFT does not adapt.
    """
    targets = []
    for name in names:
        layers = [(path, module) for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        of_bits = [path for path, module in layers if any(isinstance(m, QuantisedLinear) for m in module.modules())]
        if of_bits:
            raise RankwiseError(
                f"{of_bits[0]} is written in few bits, which PEFT does not adapt: adapt what rankwise densify writes"
            )
        low_rank = [f"{path}.{factor}" for path, m in layers if isinstance(m, LowRankLinear) for factor in ("first", "second")]
        dense = [path for path, module in layers if holds_matrix(module)]
        if not low_rank + dense:
            raise RankwiseError(f"no linear layer of {type(model).__name__} is called {name!r}")
        targets += low_rank + dense
    return targets
