"""What a malformed input is, and how a folder is spoiled."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

COMPRESS = "compress llama --allocation uniform --calibration story.txt --length 32 --samples 10 -o out"
DENSIFY = "densify small -o out"
EVALUATE = "evaluate small --reference llama --text story.txt --length 32 --samples 4"
INSPECT = "inspect small"
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DROP = object()
Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """`spoil` does its work in the folder that `line` then runs in."""

    name: str
    line: str
    spoil: Spoil = lambda root: None


class Evil:
    """Runs code when it is unpickled: it makes a folder named `executed`."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


EVIL_CODE = "import os\nos.mkdir('executed')\n"


def write(path: str, content: bytes | str) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / path).write_bytes(data)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def replaced(path: str, make: Callable[[Path], object]) -> Spoil:
    """Something else than a file in its place."""

    def spoil(root: Path) -> None:
        remove(root / path)
        make(root / path)

    return spoil


def edited(path: str, change: Callable[[Any], Any]) -> Spoil:
    """A JSON file, changed in place or replaced by what `change` returns."""

    def spoil(root: Path) -> None:
        content = json.loads((root / path).read_text())
        changed = change(content)
        (root / path).write_text(json.dumps(content if changed is None else changed))

    return spoil


def merged(path: str, *keys: str, **changes: Any) -> Spoil:
    """A JSON file with `changes` at `keys`; DROP takes one out."""

    def change(content: Any) -> None:
        inner = content
        for key in keys:
            inner = inner[key]
        inner.update(changes)
        for name in [name for name, value in changes.items() if value is DROP]:
            del inner[name]

    return edited(path, change)


def weights(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """The tensors of a folder, changed in place."""

    def spoil(root: Path) -> None:
        tensors = load_file(root / folder / WEIGHTS)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def header(folder: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """The header of a safetensors file, written anew over the same bytes; `change` may give the text itself."""

    def spoil(root: Path) -> None:
        file = root / folder / WEIGHTS
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + size])
        changed = change(content)
        text = changed if isinstance(changed, str) else json.dumps(content if changed is None else changed)
        file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data[8 + size :])

    return spoil


def bytes_of(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda root: (root / path).write_bytes(change((root / path).read_bytes()))


def sharded(change: Callable[[dict[str, Any]], Any], shard: str = "part.safetensors") -> Spoil:
    """The weights as one shard with an index, changed."""

    def spoil(root: Path) -> None:
        names = list(load_file(root / "llama" / WEIGHTS))
        (root / "llama" / WEIGHTS).rename(root / "llama" / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        changed = change(index)
        (root / "llama" / INDEX).write_text(changed if isinstance(changed, str) else json.dumps(changed or index))

    return spoil


def together(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


NESTED = "[" * 100_000
NOT_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a pipe": os.mkfifo,
    "an endless device": lambda p: p.symlink_to("/dev/zero"),
}
NOT_JSON: dict[str, bytes | str] = {
    "empty": "",
    "cut short": '{"a": 1, "b',
    "not an object but a list": "[]",
    "not an object but a number": "3",
    "null": "null",
    "a text": '"text"',
    "bytes": bytes(range(256)),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deeply nested": NESTED,
    "deep objects": '{"a":' * 100_000,
    "a number of many digits": '{"a": ' + "9" * 10_000 + "}",
    "a page": "<!DOCTYPE html><html><body>404</body></html>",
    "a pointer to large storage": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a pickle": pickle.dumps(Evil()),
}


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w.index_fill(0, torch.tensor([1]), value)
