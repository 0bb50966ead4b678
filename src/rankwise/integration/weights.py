"""A model whose weights stay on disk: its skeleton, its tensors one at a time, and a result written one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rankwise.errors import InMemoryOnlyError, RankwiseError
from rankwise.integration.checkpoint import class_of
from rankwise.integration.files import reason, weight_files

SAFETENSORS_DTYPES = {  # in the order in which safetensors lays tensors out
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
Read = Callable[[str], Tensor]
FINITE_AT_ONCE = 2**22  # numbers: asking takes more bytes than they do


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a model. file_of: tensor name -> file."""

    file_of: dict[str, Path]

    @classmethod
    def of(cls, model: str | Path) -> Weights:
        """Of a folder, or a name on the hub, which is downloaded. Raises `RankwiseError` where there are no such files."""
        folder = Path(model)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
        file_of: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    file_of |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise RankwiseError(f"cannot load {model}: {path.name}: {reason(error)}") from None
        return cls(file_of)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor, as stored; the file is closed again, so that none of it stays in memory."""
        try:
            with safe_open(self.file_of[name], framework="pt") as file:
                return file.get_tensor(name).clone()
        except (OSError, SafetensorError) as error:
            raise RankwiseError(f"{self.file_of[name]} cannot be read: {error}") from None

    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor."""
        for name in self.file_of:
            with safe_open(self.file_of[name], framework="pt") as file:
                dtype = file.get_slice(name).get_dtype()
            for known, text in SAFETENSORS_DTYPES.items():
                if text == dtype and known.is_floating_point:
                    return known
        raise RankwiseError("the model has no weights in float32, bfloat16 or float16")


@dataclass(frozen=True)
class Source:
    """Where an empty model's weights are. parameters: every name of each parameter -> the empty parameter."""

    weights: Weights
    parameters: dict[str, nn.Parameter]

    def read(self, name: str) -> Tensor:
        """A parameter's values in its dtype. Raises `RankwiseError` where they are not finite or of another shape."""
        parameter = self.parameters[name]
        stored = name
        if name not in self.weights.file_of:  # tied: stored under another of its names
            stored = next(n for n, p in self.parameters.items() if p is parameter and n in self.weights.file_of)
        tensor = self.weights.read(stored).to(parameter.dtype)
        if tensor.shape != parameter.shape:
            raise RankwiseError(f"{stored} has the shape {tuple(tensor.shape)}, the model's is {tuple(parameter.shape)}")
        if not all(torch.isfinite(part).all() for part in tensor.reshape(-1).split(FINITE_AT_ONCE)):
            raise RankwiseError(f"the model's weight {name} has values that are NaN or infinite")
        return tensor


def empty_model(model: str | Path, config: Any, dtype: str) -> tuple[PreTrainedModel, Source]:
    """The model without its weights (on the meta device), but with its buffers; and where its weights are.

    Raises `InMemoryOnlyError` where the files do not hold its weights under its own names.
    """
    weights = Weights.of(model)
    cls: Any = class_of(config) or AutoModelForCausalLM
    stored = getattr(config, "dtype", None) or weights.dtype()
    target = stored if dtype == "auto" else getattr(torch, dtype)
    build = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    with init_empty_weights():
        empty = build(config, dtype=target)
    empty.tie_weights()
    exact = {
        *(empty._keep_in_fp32_modules_strict or ()),
        *((empty._keep_in_fp32_modules or ()) if target == torch.float16 else ()),
    }
    if exact and target != torch.float32:
        raise InMemoryOnlyError(f"{type(empty).__name__} keeps {', '.join(sorted(exact))} in float32 beside {target}")
    tied = set(getattr(empty, "all_tied_weights_keys", {}) or {})
    expected = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    renamed = sorted(revert_weight_conversion(empty, empty.state_dict()).keys() - expected.keys())
    missing = sorted(expected.keys() - weights.file_of.keys() - tied)
    left_over = sorted(weights.file_of.keys() - expected.keys())
    if missing or left_over or renamed:
        what = f"misses {missing[0]}" if missing else f"has {[*left_over, *renamed][0]}, which the model has not"
        raise InMemoryOnlyError(f"weights are read block by block under the model's own names, and {model} {what}")
    return empty.eval(), Source(weights, dict(empty.named_parameters(remove_duplicate=False)))


@contextmanager
def saving_from(read: Read) -> Iterator[None]:
    """While inside, `save_pretrained` of a model on the meta device writes, for each of its tensors, what `read(name)` gives."""

    def write(tensors: Mapping[str, Tensor], file: str, metadata: Mapping[str, str]) -> None:
        write_safetensors(Path(file), tensors, metadata, read)

    with mock.patch.object(transformers.modeling_utils, "safe_save_file", write):
        yield


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], read: Read) -> None:
    """The very bytes that `safetensors.torch.save_file` writes, with one tensor in memory at a time.

    tensors: name -> tensor; of those on the meta device, `read(name)` gives the values in the same dtype and shape.
    """
    order = list(SAFETENSORS_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = read(name) if tensors[name].is_meta else tensors[name]
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
            if tensor.numel():
                out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
