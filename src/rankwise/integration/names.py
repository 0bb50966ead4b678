"""The names of a model's tensors on disk.

transformers saves some models under other names than their own, joined, split or turned, and undoes that as it loads them. What
compression made has shapes of its own, and may not go that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


def spares(model: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether transformers saves these tensors of `model` as they are, and finds them under their names again."""
    try:
        saved = revert_weight_conversion(model, dict(tensors))
    except Exception:  # as many ways as there are conversions
        return False
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    own = model.state_dict()
    found = {}
    for name, tensor in saved.items():
        found[rename_source_key(name, renamings, converters, model.base_model_prefix, own)] = tensor
    return len(found) == len(tensors) and all(found.get((name, None)) is tensor for name, tensor in tensors.items())
