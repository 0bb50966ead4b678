"""From a compressed model back to an ordinary one: the same outputs, no gain in size, no rankwise needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import RankwiseError
from rankwise.integration.checkpoint import load_compressed, load_tokenizer, refuse_output, written_whole
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.integration.result import save_model
from rankwise.layers.linear import bias_of, dense_linear
from rankwise.layers.matrices import stack_experts


def densify_in_place(model: Any, config: RankwiseConfig) -> nn.Module:
    """Multiply the factors out and stack the experts again, in place. Products are float32, rounded once."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for path in config.written:
        in_stack = path.startswith(tuple(f"{e}." for e in config.experts))
        original = None if in_stack else skeleton.get_submodule(path)
        if config.affine and path in config.ranks and (original is None or bias_of(original) is None):
            raise RankwiseError(
                f"{path} has affine factors, and {type(model).__name__} has no bias there to keep their mean: "
                "only a model compressed in another decomposition can be made dense"
            )
        if isinstance(original, nn.Embedding):
            original.weight = nn.Parameter(_multiplied(model.get_submodule(path)), requires_grad=False)
            model.set_submodule(path, original)
        else:
            model.set_submodule(path, _dense(model.get_submodule(path), isinstance(original, Conv1D)))
    stack_experts(model, config.experts)
    if vars(model).pop("_tied_weights_keys", None):  # of tables in few bits
        model.tie_weights()
    return model


def _dense(layer: Any, transposed: bool) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return dense_linear(_multiplied(layer), bias, transposed)


def _multiplied(layer: Any) -> Tensor:
    dtype = next(tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point())
    weight: Tensor = layer.float().weight
    return weight.detach().to(dtype)


def densify(path: str | Path, output: str | Path, overwrite: bool = False) -> None:
    """Write the plain dense equivalent of the compressed folder `path` to `output`.

    Raises `RankwiseError` where `path` is no compressed folder or `output` is taken.
    """
    refuse_output(Path(output), overwrite, path)
    model, tokenizer = load_compressed(path), load_tokenizer(path)
    with written_whole(Path(output), overwrite) as folder:
        save_model(folder, model.dequantize(), tokenizer, path)
