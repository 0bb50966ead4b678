"""From a compressed model back to an ordinary one: the same outputs, no gain in size, no rankwise needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import RankwiseError
from rankwise.integration.checkpoint import load_compressed, load_tokenizer, refuse_output, written_whole
from rankwise.integration.quantizer import RankwiseConfig
from rankwise.integration.result import save_model
from rankwise.layers.experts import unstack
from rankwise.layers.linear import bias_of, dense_linear, weight_of
from rankwise.layers.matrices import stack_experts


def densify_in_place(model: Any, config: RankwiseConfig) -> nn.Module:
    """Multiply the factors out, put zeros in the place of neurons that are gone and stack the experts again, in place. Products
    are float32, rounded once."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for path in config.experts:
        unstack(skeleton.get_submodule(path))
    for path in config.written:
        original = skeleton.get_submodule(path)
        if config.affine and path in config.ranks and bias_of(original) is None:
            raise RankwiseError(
                f"{path} has affine factors, and {type(model).__name__} has no bias there to keep their mean: "
                "only a model compressed in another decomposition can be made dense"
            )
        if isinstance(original, nn.Embedding):
            original.weight = nn.Parameter(_multiplied(model.get_submodule(path)), requires_grad=False)
            model.set_submodule(path, original)
        else:
            model.set_submodule(path, _dense(model.get_submodule(path), isinstance(original, Conv1D)))
    for path, (*_, parts) in config.sizes.items():
        model.set_submodule(path, _padded(model.get_submodule(path), skeleton.get_submodule(path), parts))
    stack_experts(model, config.experts)
    if vars(model).pop("_tied_weights_keys", None):  # of tables in few bits
        model.tie_weights()
    return model


def _dense(layer: Any, transposed: bool) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return dense_linear(_multiplied(layer), bias, transposed)


def _padded(small: nn.Module, original: nn.Module, parts: int) -> nn.Module:
    """The layer with zeros where the original has more: at the end of each part of its outputs, and of its inputs."""
    more = weight_of(original).shape[0] - weight_of(small).shape[0], weight_of(original).shape[1] - weight_of(small).shape[1]

    def rows(tensor: Tensor) -> Tensor:
        zeros = tensor.new_zeros(more[0] // parts, *tensor.shape[1:])
        return torch.cat([piece for part in tensor.chunk(parts) for piece in (part, zeros)])

    bias = bias_of(small)
    weight = F.pad(rows(weight_of(small)), (0, more[1]))
    return dense_linear(weight.detach(), None if bias is None else rows(bias), isinstance(original, Conv1D))


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
