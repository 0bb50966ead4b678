"""What a model's answer is: numbers in rows, and the distribution that they speak of."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError

# logits of one choice out of several (tokens, classes, places); logits of a yes or no each; means of Gaussians of variance 1, as
# a squared error has it; hidden states and embeddings, means of Gaussians of the values' own variance
Kind = Literal["categorical", "bernoulli", "gaussian", "features"]


def kind_of(model: Any, logits: Tensor) -> Kind:
    """What a model's logits [..., width] speak of, by their width and the problem that its config names."""
    width, config = logits.shape[-1], model.config
    problem = getattr(config, "problem_type", None) if width == getattr(config, "num_labels", None) else None
    if problem == "multi_label_classification":
        return "bernoulli"
    return "gaussian" if width == 1 or problem == "regression" else "categorical"


def values_in(model: Any, output: Any, batch: Batch) -> tuple[Tensor, Kind]:
    """The numbers in a model's output object for `batch`, [sequences, length, width] or [rows, width]: its logits, or its last
    hidden states, or logits of places (of answers to questions, a row each), or the first features that it gives.

    Raises `RankwiseError` where there are none.
    """
    named = output.items() if hasattr(output, "items") else ()
    found = {name: value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}
    if "logits" in found:
        return _logits(model, found["logits"], batch)
    if "last_hidden_state" in found:
        return found["last_hidden_state"], "features"
    places = [value for name, value in found.items() if name.endswith("_logits")]
    if places:
        return torch.stack([value for value in places if value.shape == places[0].shape], 1).flatten(0, 1), "categorical"
    features = [value for name, value in found.items() if value.ndim > 1 and not name.startswith("logits_per_")]
    if not features:
        raise RankwiseError(f"the model's output {type(output).__name__} has neither logits nor hidden states nor other features")
    return torch.cat([value for value in features if value.shape[1:] == features[0].shape[1:]]), "features"


def _logits(model: Any, logits: Tensor, batch: Batch) -> tuple[Tensor, Kind]:
    if logits.ndim not in (2, 3):
        raise RankwiseError(f"the logits of {type(model).__name__} are {tuple(logits.shape)}: neither of sequences nor of tokens")
    ids = batch.get("input_ids")
    if ids is not None and logits.shape == ids.shape and logits.shape[1] != model.config.num_labels:
        return logits[..., None], "bernoulli"  # of each token whether it was replaced
    return logits, kind_of(model, logits)
