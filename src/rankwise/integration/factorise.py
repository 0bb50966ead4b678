"""The swap: chosen components become layers of the model, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.decomposition.solver import Decomposition
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.layers.matrices import stack_experts
from rankwise.masks.layers import Masks, folded, is_whole


def factorise(
    model: Any, decompositions: Mapping[str, Decomposition], masks: Masks, experts: Sequence[str], form: str
) -> RankwiseConfig:
    """Put the chosen layers into the model, its experts unstacked; experts that are all left dense are stacked again."""
    ranks: dict[str, int] = {}
    affine = False
    for name, mask in masks.items():
        if mask is not None:
            decomposition = decompositions[name]
            model.set_submodule(name, folded(model.get_submodule(name), decomposition, mask, form))
            if not is_whole(mask):
                ranks[name] = int(mask.count_nonzero())
                affine = affine or decomposition.centre is not None
    kept = [path for path in experts if any(name.startswith(f"{path}.") for name in ranks)]
    stack_experts(model, set(experts) - set(kept))
    return RankwiseConfig(ranks=ranks, form=form, experts=kept, affine=affine)
