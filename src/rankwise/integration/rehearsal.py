"""Saving and loading tried before the long work, without values."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rankwise.errors import RankwiseError, reason
from rankwise.integration.quantizer import RankwiseConfig, RankwiseQuantizer, attach


def refuse_unloadable(model: PreTrainedModel, matrices: Collection[str], experts: Collection[str], form: str) -> None:
    """Raises `RankwiseError` where transformers would not load what compressing these matrices and experts will save."""
    cls: Any = type(model)
    config = RankwiseConfig(ranks=dict.fromkeys(matrices, 1), form=form, experts=list(experts))
    quantizer = RankwiseQuantizer(config)
    try:
        with torch.device("meta"):
            empty = cls(copy.deepcopy(model.config))
            quantizer._process_model_before_weight_loading(empty)
            attach(empty, config)
            tensors, _ = quantizer.get_state_dict_and_metadata(empty)
            saved = revert_weight_conversion(empty, tensors)
            empty.config.quantization_config = config.to_dict()  # as it stands in config.json
            options = {"config": empty.config, "state_dict": saved, "device_map": "meta"}
            _, info = cls.from_pretrained(None, output_loading_info=True, **options)
    except Exception as error:  # as many ways as there are models
        raise RankwiseError(f"{cls.__name__}: transformers cannot load what would be saved: {reason(error)}") from None
    odd = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if odd:
        raise RankwiseError(f"{cls.__name__}: transformers would not find all of what is saved: {', '.join(odd[:3])}")
