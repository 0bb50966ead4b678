"""Malformed results of rankwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch

from hostile.case import (
    COMPRESS,
    DENSIFY,
    DROP,
    INSPECT,
    WEIGHTS,
    Case,
    Q,
    Spoil,
    bytes_of,
    changed,
    edited,
    merged,
    poisoned,
    weights,
    write,
)

RANKS: list[Any] = [0, -1, 10**9, 10**30, 2.5, "3", True, None, float("nan"), [3], {}]
PATHS = ["model.layers.0", "model.norm", "", "model.embed_tokens", "model.layers.7.mlp.up_proj", "model..layers", "../x"]
PATHS += [f"{Q}.first", "__class__", "model.layers.0.self_attn.q_proj ", "lm_head", "mödel\u202e"]


def quantization() -> Iterator[Case]:
    file = "small/config.json"

    def settings(**changes: Any) -> Spoil:
        return merged(file, "quantization_config", **changes)

    for value in (0, 99, "1", None, True, [1], DROP):
        shown = "left out" if value is DROP else repr(value)
        yield Case(f"format_version={shown}", DENSIFY, settings(format_version=value))
    for value in ("32", 16, True, None, [64], 32.0):
        yield Case(f"group={value!r}", DENSIFY, settings(format_version=5, group=value))
    for value in ("floats", "grid of 32", 3, True, None, ["trellis"]):
        yield Case(f"coding={value!r}", DENSIFY, settings(format_version=6, coding=value))
    for value in ("text", [], None, 3, {}, DROP):
        shown = "left out" if value is DROP else repr(value)
        yield Case(f"ranks={shown}", DENSIFY, settings(ranks=value))
    for value in ("text", [3], {"a": 1}, None, ["model.nonsense"], ["model.layers.0.mlp"], [""]):
        yield Case(f"experts={value!r}", DENSIFY, settings(experts=value))
    for value in RANKS:
        yield Case(f"rank={value!r} in config.json", DENSIFY, merged(file, "quantization_config", "ranks", **{Q: value}))
        if value is not None:
            yield Case(f"rank={value!r} in ranks.json", INSPECT, merged("small/ranks.json", **{Q: value}))
    for path in PATHS:
        yield Case(f"config.json: a rank for {path!r}", DENSIFY, merged(file, "quantization_config", "ranks", **{path: 3}))
        yield Case(f"ranks.json: a rank for {path!r}", INSPECT, merged("small/ranks.json", **{path: 3}))
    one_more = edited(file, lambda c: c["quantization_config"]["ranks"].update({Q: c["quantization_config"]["ranks"][Q] + 1}))
    yield Case("config.json: a rank too many", DENSIFY, one_more)
    yield Case("config.json: a rank left out", DENSIFY, merged(file, "quantization_config", "ranks", **{Q: DROP}))
    yield Case("quantization_config: an unknown key", DENSIFY, settings(nonsense=1))
    yield Case("quantization_config: an unknown method", DENSIFY, settings(quant_method="nonsense"))
    yield Case("quantization_config: no method", DENSIFY, settings(quant_method=DROP))
    yield Case("no quantization_config", DENSIFY, merged(file, quantization_config=DROP))
    yield Case(
        "no quantization_config, taken for dense", COMPRESS.replace("llama", "small"), merged(file, quantization_config=DROP)
    )
    for value in ("text", [1], 3):
        yield Case(f"quantization_config={value!r}", DENSIFY, merged(file, quantization_config=value))
    for key, value in {"hidden_size": 96, "num_hidden_layers": 10**9, "vocab_size": 10**12, "intermediate_size": 32}.items():
        yield Case(f"compressed config {key}={value}", DENSIFY, merged(file, **{key: value}))
        yield Case(f"compressed config {key}={value}, inspected", INSPECT, merged(file, **{key: value}))
    yield Case("the ranks of another model", INSPECT, write("small/ranks.json", '{"transformer.h.0.attn.c_attn": 3}'))
    twice = bytes_of("small/ranks.json", lambda b: b.rstrip()[:-1] + f', "{Q}": 1}}'.encode())
    yield Case("ranks.json: a matrix twice", INSPECT, twice)


def compressed_weights() -> Iterator[Case]:
    first, second = f"{Q}.first.weight", f"{Q}.second.weight"
    yield Case("factors: transposed", DENSIFY, weights("small", changed(first, lambda w: w.T)))
    yield Case("factors: one missing", DENSIFY, weights("small", lambda w: w.pop(second)))
    yield Case("factors: NaN", DENSIFY, weights("small", changed(first, poisoned(float("nan")))))
    yield Case("factors: a lower rank", DENSIFY, weights("small", changed(first, lambda w: w[1:])))
    yield Case("factors: whole numbers", DENSIFY, weights("small", changed(first, lambda w: w.to(torch.int32))))
    yield Case(
        "factors: swapped", DENSIFY, weights("small", lambda w: w.update({first: w[second].clone(), second: w[first].clone()}))
    )
    yield Case(
        "weights of the dense model", DENSIFY, lambda root: shutil.copy(root / "llama" / WEIGHTS, root / "small" / WEIGHTS)
    )
