"""Malformed weights."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from hostile.case import (
    COMPRESS,
    DENSIFY,
    DOWN,
    NESTED,
    NOT_FILES,
    NOT_JSON,
    WEIGHTS,
    Case,
    Evil,
    bytes_of,
    changed,
    header,
    poisoned,
    replaced,
    sharded,
    together,
    weights,
    write,
)


def _first(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors[f"{DOWN}.weight"]


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda h: "[]",
    "no JSON": lambda h: "nonsense",
    "deeply nested": lambda h: NESTED,
    "offsets that overlap": lambda h: _first(h).update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"]),
    "offsets beyond the end": lambda h: _first(h).update(data_offsets=[10**9, 10**9 + 48 * 64 * 4]),
    "offsets backwards": lambda h: _first(h).update(data_offsets=_first(h)["data_offsets"][::-1]),
    "negative offsets": lambda h: _first(h).update(data_offsets=[-4, 4]),
    "one offset": lambda h: _first(h).update(data_offsets=[0]),
    "an unknown dtype": lambda h: _first(h).update(dtype="F99"),
    "a dtype of another size": lambda h: _first(h).update(dtype="F64"),
    "whole numbers": lambda h: _first(h).update(dtype="I32"),
    "unsigned numbers": lambda h: _first(h).update(dtype="U32"),
    "a negative shape": lambda h: _first(h).update(shape=[-48, -64]),
    "a huge shape": lambda h: _first(h).update(shape=[2**40, 2**40]),
    "another shape": lambda h: _first(h).update(shape=[64, 48]),
    "a flat shape": lambda h: _first(h).update(shape=[64 * 48]),
    "no shape": lambda h: _first(h).pop("shape") and None,
    "metadata of numbers": lambda h: h.update(__metadata__={"format": 3}),
    "no tensors": lambda h: {"__metadata__": {"format": "pt"}},
    "a tensor without a name": lambda h: h.update({"": h.pop(f"{DOWN}.weight")}),
    "a tensor under another name": lambda h: h.update({"\u202enonsense\0": h.pop(f"{DOWN}.weight")}),
}


def safetensors() -> Iterator[Case]:
    for folder, line in (("llama", COMPRESS), ("small", DENSIFY)):
        path = f"{folder}/{WEIGHTS}"
        for length in (0, 5, 8, 100, 5000, -1):
            yield Case(f"{path}: cut to {length} bytes", line, bytes_of(path, lambda b, length=length: b[:length]))  # type: ignore[misc]
        for size in (0, 10**6, 2**40, 2**63, 2**64 - 1):
            claim = struct.pack("<Q", size)
            yield Case(f"{path}: a header of {size} bytes", line, bytes_of(path, lambda b, claim=claim: claim + b[8:]))  # type: ignore[misc]
        for kind in ("a page", "a pointer to large storage", "a pickle", "bytes"):
            yield Case(f"{path}: {kind}", line, write(path, NOT_JSON[kind]))
        yield Case(f"{path}: more bytes than tensors", line, bytes_of(path, lambda b: b + bytes(100)))
        for kind, make in NOT_FILES.items():
            yield Case(f"{path}: {kind}", line, replaced(path, make))
        yield Case(f"{path}: infinite values", line, weights(folder, changed("model.norm.weight", poisoned(float("inf")))))
    for kind, change in HEADERS.items():
        yield Case(f"weights with {kind}", COMPRESS, header("llama", change))
    name = f"{DOWN}.weight"
    yield Case("weights: NaN", COMPRESS, weights("llama", changed(name, poisoned(float("nan")))))
    yield Case("weights: transposed", COMPRESS, weights("llama", changed(name, lambda w: w.T)))
    yield Case("weights: one more axis", COMPRESS, weights("llama", changed(name, lambda w: w[None])))
    yield Case("weights: none", COMPRESS, weights("llama", changed(name, lambda w: w[:0])))
    yield Case("weights: int8", COMPRESS, weights("llama", changed(name, lambda w: w.to(torch.int8))))
    yield Case("weights: bool", COMPRESS, weights("llama", changed(name, lambda w: w > 0)))
    yield Case("weights: complex", COMPRESS, weights("llama", changed(name, lambda w: w.to(torch.complex64))))
    yield Case("weights: one missing", COMPRESS, weights("llama", lambda w: w.pop(name)))
    one_more = {"model.layers.0.mlp.up_proj.bias": torch.zeros(64)}
    yield Case("weights: one too many", COMPRESS, weights("llama", lambda w: w.update(one_more)))


SHARDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "above": lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "../small/model.safetensors")),
    "elsewhere": lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "/etc/passwd")),
    "roundabout": lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "../llama/part.safetensors")),
    "missing": lambda i: i["weight_map"].update({f"{DOWN}.weight": "gone.safetensors"}),
    "no text": lambda i: i["weight_map"].update({f"{DOWN}.weight": 3}),
    "null": lambda i: i["weight_map"].update({f"{DOWN}.weight": None}),
    "a zero byte": lambda i: i["weight_map"].update({f"{DOWN}.weight": "part\0.safetensors"}),
    "an address": lambda i: i["weight_map"].update({f"{DOWN}.weight": "https://example.com/part.safetensors"}),
    "a folder": lambda i: i["weight_map"].update({f"{DOWN}.weight": "."}),
    "no map": lambda i: i.pop("weight_map") and None,
    "a list": lambda i: i.update(weight_map=list(i["weight_map"])),
    "an empty map": lambda i: i.update(weight_map={}),
    "no metadata": lambda i: i.pop("metadata") and i.update(weight_map={"a": "b"}),
}


def shards() -> Iterator[Case]:
    for kind, change in SHARDS.items():
        yield Case(f"a shard: {kind}", COMPRESS, sharded(change))
    cut = bytes_of("llama/part.safetensors", lambda b: b[:4000])
    yield Case("a shard: cut short", COMPRESS, together(sharded(lambda index: None), cut))


def pickles() -> Iterator[Case]:
    gone = replaced(f"llama/{WEIGHTS}", lambda path: None)
    tensors = lambda root: torch.save(load_file(root / "llama" / WEIGHTS), root / "llama/pytorch_model.bin")  # noqa: E731
    yield Case("only a pickle", COMPRESS, together(tensors, gone))
    evil = write("llama/pytorch_model.bin", pickle.dumps(Evil()))
    yield Case("only an evil pickle", COMPRESS, together(evil, gone))
    index = {"metadata": {}, "weight_map": {f"{DOWN}.weight": "pytorch_model.bin"}}
    only = together(evil, gone, write("llama/pytorch_model.bin.index.json", json.dumps(index)))
    yield Case("only a sharded pickle", COMPRESS, only)
    yield Case("a pickle named as a shard", COMPRESS, together(evil, sharded(lambda i: index)))
    for name in ("tf_model.h5", "model.gguf", "flax_model.msgpack", "adapter_model.bin"):
        yield Case(f"only {name}", COMPRESS, together(write(f"llama/{name}", pickle.dumps(Evil())), gone))
    small = together(write("small/pytorch_model.bin", pickle.dumps(Evil())), replaced(f"small/{WEIGHTS}", lambda path: None))
    yield Case("only a pickle, compressed", DENSIFY, small)
