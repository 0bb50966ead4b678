"""The swap: chosen components become layers of the model, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rankwise.decomposition.solver import Decomposition
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import stack_experts
from rankwise.layers.quantised import BYTE, CODING, QuantisedLinear
from rankwise.masks.layers import Masks, folded, is_whole


def factorise(
    model: Any,
    decompositions: Mapping[str, Decomposition],
    masks: Masks,
    experts: Sequence[str],
    form: str,
    bits: Mapping[str, int] | None = None,
    shipped: Mapping[str, nn.Module] | None = None,
    sizes: Mapping[str, list[int]] | None = None,
) -> RankwiseConfig:
    """Put the chosen layers into the model, its experts unstacked; experts that are all left dense are stacked again.

    bits: of the matrices that are written in few; shipped: layers that are there already, those in bits and refined ones; sizes:
    as of `Run`.
    """
    shipped, bits = shipped or {}, dict(bits or {})
    ranks: dict[str, int] = {}
    affine = False
    for name, mask in masks.items():
        dense, layer = model.get_submodule(name), shipped.get(name)
        if mask is not None:
            decomposition = decompositions[name]
            layer = layer or folded(dense, decomposition, mask, form)
            if not is_whole(mask):
                ranks[name] = int(mask.count_nonzero())
                affine = affine or decomposition.centre is not None
        if layer is not None:
            model.set_submodule(name, layer.to(weight_of(dense).dtype))
    sizes = dict(sizes or {})
    changed = (*ranks, *bits, *sizes)
    kept = [path for path in experts if any(name.startswith(f"{path}.") for name in changed)]
    stack_experts(model, set(experts) - set(kept))
    few = (module for layer in shipped.values() for module in layer.modules() if isinstance(module, QuantisedLinear))
    coding = next((module.coding for module in few if module.bits < BYTE), CODING)  # a folder has one
    return RankwiseConfig(ranks=ranks, form=form, bits=bits, coding=coding, sizes=sizes, experts=kept, affine=affine)
