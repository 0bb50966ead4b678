"""A model's safetensors files, read one tensor at a time, and written a part of the model at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rankwise.errors import InMemoryOnlyError, RankwiseError, reason
from rankwise.integration.files import weight_files

SAFETENSORS_DTYPES = {  # in the order in which safetensors lays tensors out
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.bool: "BOOL",
}
Tensors = Mapping[str, Tensor]
PartOf = Callable[[str], Hashable]  # the part of the model that a tensor of this name is in


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a model: tensor name -> file, and shape."""

    file_of: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: str | Path) -> Weights:
        """Of a folder, or a name on the hub, which is downloaded. Raises `RankwiseError` where there are no such files."""
        folder = Path(model)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
        found = cls({}, {})
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  not a mapping
                        found.file_of[name], found.shapes[name] = path, tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise RankwiseError(f"cannot load {model}: {path.name}: {reason(error)}") from None
        return found

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


def refuse_joined(model: PreTrainedModel, part_of: PartOf) -> None:
    """Raises `InMemoryOnlyError` where transformers joins tensors of several parts when it saves the model."""
    tensors = model.state_dict()
    apart = [name for own in _parts(tensors, part_of).values() for name in revert_weight_conversion(model, own)]
    if joined := sorted(revert_weight_conversion(model, tensors).keys() ^ set(apart)):
        raise InMemoryOnlyError(f"{type(model).__name__} stores tensors of several blocks in one ({joined[0]})")


@contextmanager
def saving_from(part_of: PartOf, read: Callable[[Any], Tensors]) -> Iterator[None]:
    """While inside, `save_pretrained` of a model on the meta device writes the values that `read` gives of the tensors of a
    part, one part in memory at a time."""
    convert = transformers.modeling_utils.revert_weight_conversion
    home: dict[str, tuple[Hashable, Callable[[Tensors], Tensors]]] = {}  # name in the files -> its part, and the way there
    kept: dict[Hashable, Tensors] = {}

    def converted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Tensors:
        for part, own in _parts(tensors, part_of).items():

            def there(values: Tensors, own: Tensors = own) -> Tensors:
                real = {name: values[name] if tensor.is_meta else tensor for name, tensor in own.items()}
                return convert(model, real)

            home.update(dict.fromkeys(convert(model, own), (part, there)))
        return convert(model, tensors)

    def value(name: str) -> Tensor:
        part, there = home[name]
        if part not in kept:
            kept.clear()  # before the next is there
            kept[part] = there(read(part))
        return kept[part][name]

    def write(tensors: Tensors, file: str, metadata: Mapping[str, str]) -> None:
        write_safetensors(Path(file), tensors, metadata, value)

    with replaced(transformers.modeling_utils, safe_save_file=write, revert_weight_conversion=converted):
        yield


@contextmanager
def replaced(owner: ModuleType, **values: Any) -> Iterator[None]:
    """While inside, the module `owner` has these in place of its own, each of which must be there."""
    own = {name: getattr(owner, name) for name in values}
    try:
        vars(owner).update(values)
        yield
    finally:
        vars(owner).update(own)


def _parts(tensors: Tensors, part_of: PartOf) -> dict[Hashable, dict[str, Tensor]]:
    parts: dict[Hashable, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(part_of(name), {})[name] = tensor
    return parts


def write_safetensors(file: Path, tensors: Tensors, metadata: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
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
