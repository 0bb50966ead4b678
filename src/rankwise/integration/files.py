"""A model's files, judged before transformers opens them: they may come from strangers.

What is no regular file would hang or never end, a pickle runs code, and a config can ask for layers without number.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rankwise.errors import RankwiseError, reason

LARGEST_JSON = 2**28  # bytes: tokenizers come to tens of millions
MOST_LAYERS = 100_000  # or experts: more can only be a mistake
BUILT_ONE_BY_ONE = re.compile(r"(layers?|experts|depth)$")  # what such settings count
FLOATS = {"F64", "F32", "F16", "BF16"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


def refuse_odd_files(path: str | Path) -> None:
    """Raises `RankwiseError` where a local folder holds what no model's folder does: pipes, settings that link to
    nothing, an adapter."""
    if not os.path.isdir(path):
        return
    for file in sorted(Path(path).iterdir()):
        if not os.path.exists(file) and file.suffix not in (".json", ".yaml"):
            continue  # a link to nothing is missed where it is needed
        if not os.path.isfile(file) and not os.path.isdir(file):
            raise RankwiseError(f"{file} is neither a file nor a folder: a link to nothing, a pipe or a device")
        if file.suffix == ".json" and file.stat().st_size > LARGEST_JSON:
            raise RankwiseError(
                f"{file} has {file.stat().st_size:,} bytes: no such file of a model has more than {LARGEST_JSON:,}"
            )
        if file.name == "adapter_config.json":
            raise RankwiseError(
                f"{path} holds an adapter: merge it into its model first, or remove {file.name} where it is merged already"
            )


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `RankwiseError` where it cannot be read, and for a key that stands there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"{twice!r} stands there twice")
        return found

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise RankwiseError(f"{file} cannot be read: {reason(error)}") from None


def judge_config(path: str | Path, settings: Any) -> None:
    """Raises `RankwiseError` for a config, as it stands in config.json, that transformers could not be trusted with."""
    if not isinstance(settings, dict):
        raise RankwiseError(f"{path}: its config.json is not an object")
    names = settings.get("architectures")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise RankwiseError(f"{path}: in its config.json, architectures={names!r} is not a list of names")
    if settings.get("transformers_weights") is not None:
        raise RankwiseError(
            f"{path}: its config.json names a file of weights (transformers_weights), but only "
            "the usual ones are read: remove that entry",
        )
    if not isinstance(settings.get("quantization_config") or {}, dict):
        raise RankwiseError(f"{path}: in its config.json, quantization_config is not an object")
    for name, value in _numbers(settings):
        if BUILT_ONE_BY_ONE.search(name) and abs(value) > MOST_LAYERS:
            raise RankwiseError(f"{path}: in its config.json, {name}={value:.3g} is more than any model has")


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not math.isnan(value):
            yield name, value


def no_safetensors(model: str | Path, other: str = "another format") -> RankwiseError:
    """The error of a model whose weights, if any, are in something else than safetensors."""
    return RankwiseError(
        f"cannot load {model}: it has no weights in safetensors ({SAFE_WEIGHTS_NAME}); {other} is never read, as it "
        "may run code: convert it"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a local folder, as transformers chooses them. Raises `RankwiseError` where there are none, and
    for an index that names other files than the folder's own."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        raise no_safetensors(folder, *others[:1])
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise RankwiseError(f"cannot load {folder}: {index.name} has no weight_map of tensors and their files")
    for name in set(shards.values()):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise RankwiseError(
                f"cannot load {folder}: {index.name} names {name!r}, which is not a safetensors file in the folder"
            )
        if "\0" in name or not (folder / name).is_file():
            raise RankwiseError(f"cannot load {folder}: {index.name} names {name!r}, which is not there")
    return [folder / name for name in sorted(set(shards.values()))]


def read_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a local folder's weights: name -> its dtype (F32, BF16, ...) and shape; no tensor is read.

    Raises `RankwiseError` for files that are no whole safetensors.
    """
    found = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  not a mapping
                    tensor = opened.get_slice(name)
                    found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
        except (OSError, SafetensorError) as error:
            raise RankwiseError(f"cannot load {folder}: {file.name}: {reason(error)}") from None
    return found


def refuse_foreign_weights(folder: Path, model: nn.Module) -> None:
    """Raises `RankwiseError` where the weights in `folder` cannot be those of `model`, an empty one: whole numbers where it has
    weights, or far fewer of them than it, which would be made up and fill the memory first."""
    headers = read_headers(folder)
    parameters = dict(model.named_parameters())
    for name, (dtype, shape) in headers.items():
        if name in parameters and dtype not in FLOATS:
            raise RankwiseError(f"cannot load {folder}: its weight {name} is {dtype}, not one of {', '.join(sorted(FLOATS))}")
        if name.endswith((".first.weight", ".second.weight")) and name in parameters and shape != tuple(parameters[name].shape):
            raise RankwiseError(
                f"cannot load {folder}: its weight {name} has the shape {list(shape)}, but the "
                f"shape {list(parameters[name].shape)} by config.json",
            )
    held, wanted = sum(math.prod(shape) for _, shape in headers.values()), sum(p.numel() for p in parameters.values())
    if wanted > 2 * held:
        raise RankwiseError(f"cannot load {folder}, which has {held:,} of {wanted:,} weights: missing keys")
