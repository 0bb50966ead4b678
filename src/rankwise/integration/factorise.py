"""The swap: chosen components become low-rank layers of the model, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.decomposition.solver import Decomposition
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.layers.experts import restack
from rankwise.layers.linear import bias_of
from rankwise.masks.student import Masks, factorised


def factorise(model: Any, decompositions: Mapping[str, Decomposition], masks: Masks, experts: Sequence[str]) -> RankwiseConfig:
    """Put the low-rank layers into the model, its experts unstacked; experts that are all left dense are stacked again."""
    ranks = {name: int(mask.count_nonzero()) for name, mask in masks.items() if mask is not None}
    for name in ranks:
        mask = masks[name]
        assert mask is not None
        model.set_submodule(name, factorised(decompositions[name], mask, bias_of(model.get_submodule(name))))
    kept = [path for path in experts if any(name.startswith(f"{path}.") for name in ranks)]
    for path in set(experts) - set(kept):
        restack(model.get_submodule(path))
    return RankwiseConfig(ranks=ranks, experts=kept)
