"""Malformed inputs: each a name, a command line, and what is done to a folder in which it would succeed.

The folder holds `llama`, a tiny model with its tokenizer, `small`, the same compressed, and `story.txt`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
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


def _json_files() -> Iterator[Case]:
    files = {
        "llama/config.json": COMPRESS,
        "llama/tokenizer.json": COMPRESS,
        "small/config.json": DENSIFY,
        "small/ranks.json": INSPECT,
    }
    for path, line in files.items():
        for kind, content in NOT_JSON.items():
            yield Case(f"{path}: {kind}", line, write(path, content))
        for kind, make in NOT_FILES.items():
            yield Case(f"{path}: {kind}", line, replaced(path, make))
    for kind in ("cut short", "not an object but a list", "bytes", "deeply nested"):
        yield Case(f"tokenizer_config.json: {kind}", COMPRESS, write("llama/tokenizer_config.json", NOT_JSON[kind]))
        yield Case(f"index: {kind}", COMPRESS, sharded(lambda index, kind=kind: str(NOT_JSON[kind])))  # type: ignore[misc]
    for kind in ("not an object but a list", "bytes", "deeply nested", "a number of many digits"):
        yield Case(f"generation_config.json: {kind}", COMPRESS, write("llama/generation_config.json", NOT_JSON[kind]))
    yield Case("config.json: eight sparse gigabytes", COMPRESS, lambda root: os.truncate(root / "llama/config.json", 2**33))


CONFIG: dict[str, list[Any]] = {
    "model_type": ["nonsense", "../../etc", None, 3, [], "bert", "rankwise", DROP],
    "architectures": [
        *(["Nonsense"], ["set_seed"], ["LlamaConfig"], ["modeling_utils"], ["__class__"], [3], [None], {"a": 1}),
        *("LlamaForCausalLM", ["BertForMaskedLM"], ["LlamaForSequenceClassification"]),
    ],
    "hidden_size": [-1, 0, 47, 10**9, 10**30, 1.5, "48", None, float("nan"), [48]],
    "num_hidden_layers": [-1, 1, 3, 10**9, 10**30, 2.5, "2", None, float("inf")],
    "num_attention_heads": [0, -4, 5, 10**9, None, "4"],
    "num_key_value_heads": [-1, 3, "2"],
    "intermediate_size": [0, -1, 63, 10**12],
    "vocab_size": [0, -1, 95, 10**12, None],
    "hidden_act": ["nonsense", 3, "__import__('os').mkdir('executed')"],
    "rms_norm_eps": ["x", float("nan"), None],
    "attention_bias": [True],
    "rope_parameters": ["text", {"rope_type": "nonsense"}],
    "dtype": ["float7", "load", "os.mkdir", "int8", "complex64", 3],
    "quantization_config": ["text", [1], {"quant_method": "nonsense"}, {"bits": 4}, {"quant_method": "rankwise"}],
    "transformers_weights": ["../small/model.safetensors", "pytorch_model.bin", "/etc/passwd", 3],
}


def _configs() -> Iterator[Case]:
    for key, values in CONFIG.items():
        for value in values:
            shown = "left out" if value is DROP else repr(value)
            yield Case(f"config {key}={shown}", COMPRESS, merged("llama/config.json", **{key: value}))
    code = write("llama/evil.py", EVIL_CODE)
    mapped = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    unknown = merged("llama/config.json", auto_map=mapped, model_type="evil", architectures=["EvilModel"])
    yield Case("config with code of its own", COMPRESS, together(code, unknown))
    known = merged("llama/config.json", auto_map=mapped, architectures=["EvilModel"])
    yield Case("config with code of its own for a known type", COMPRESS, together(code, known))
    remote = {"AutoConfig": "evil/repository--evil.Config"}
    yield Case("config with code on the hub", COMPRESS, merged("llama/config.json", auto_map=remote, model_type="evil"))
    for value in ("text", 3, {"AutoConfig": 3}):
        yield Case(f"config auto_map={value!r}", COMPRESS, merged("llama/config.json", auto_map=value, model_type="evil"))
    own = merged("llama/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Evil")
    yield Case("tokenizer with code of its own", COMPRESS, together(code, own, replaced("llama/tokenizer.json", write("", "{}"))))
    twice = '{"model_type": "llama", "model_type": "nonsense"}'
    yield Case("config with a key twice", COMPRESS, write("llama/config.json", twice))


TOKENIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": lambda t: t.pop("model") and None,
    "an unknown model": lambda t: t["model"].update(type="Nonsense"),
    "no vocabulary": lambda t: t["model"].update(vocab=None),
    "a list of words": lambda t: t["model"].update(vocab=["a", "b"]),
    "negative tokens": lambda t: t["model"].update(vocab={w: -i for w, i in t["model"]["vocab"].items()}),
    "tokens of another model": lambda t: t["model"].update(vocab={w: i * 100 for w, i in t["model"]["vocab"].items()}),
    "fractional tokens": lambda t: t["model"].update(vocab={w: i + 0.5 for w, i in t["model"]["vocab"].items()}),
    "huge tokens": lambda t: t["model"].update(vocab={w: i + 2**40 for w, i in t["model"]["vocab"].items()}),
    "no unknown word": lambda t: t["model"].update(unk_token="gone", vocab={"a": 0}),
    "a broken expression": lambda t: t["pre_tokenizer"].update(pattern={"Regex": "("}),
    "a foreign version": lambda t: t.update(version="9.9"),
}


def _tokenizers() -> Iterator[Case]:
    for kind, change in TOKENIZERS.items():
        yield Case(f"tokenizer with {kind}", COMPRESS, edited("llama/tokenizer.json", change))


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


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def _poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w.index_fill(0, torch.tensor([1]), value)


def _safetensors() -> Iterator[Case]:
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
        yield Case(f"{path}: infinite values", line, weights(folder, _set("model.norm.weight", _poisoned(float("inf")))))
    for kind, change in HEADERS.items():
        yield Case(f"weights with {kind}", COMPRESS, header("llama", change))
    name = f"{DOWN}.weight"
    yield Case("weights: NaN", COMPRESS, weights("llama", _set(name, _poisoned(float("nan")))))
    yield Case("weights: transposed", COMPRESS, weights("llama", _set(name, lambda w: w.T)))
    yield Case("weights: one more axis", COMPRESS, weights("llama", _set(name, lambda w: w[None])))
    yield Case("weights: none", COMPRESS, weights("llama", _set(name, lambda w: w[:0])))
    yield Case("weights: int8", COMPRESS, weights("llama", _set(name, lambda w: w.to(torch.int8))))
    yield Case("weights: bool", COMPRESS, weights("llama", _set(name, lambda w: w > 0)))
    yield Case("weights: complex", COMPRESS, weights("llama", _set(name, lambda w: w.to(torch.complex64))))
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


def _shards() -> Iterator[Case]:
    for kind, change in SHARDS.items():
        yield Case(f"a shard: {kind}", COMPRESS, sharded(change))
    cut = bytes_of("llama/part.safetensors", lambda b: b[:4000])
    yield Case("a shard: cut short", COMPRESS, together(sharded(lambda index: None), cut))


def _pickles() -> Iterator[Case]:
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


RANKS: list[Any] = [0, -1, 10**9, 10**30, 2.5, "3", True, None, float("nan"), [3], {}]
PATHS = ["model.layers.0", "model.norm", "", "model.embed_tokens", "model.layers.7.mlp.up_proj", "model..layers", "../x"]
PATHS += [f"{Q}.first", "__class__", "model.layers.0.self_attn.q_proj ", "lm_head", "mödel\u202e"]


def _quantization() -> Iterator[Case]:
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


def _compressed_weights() -> Iterator[Case]:
    first, second = f"{Q}.first.weight", f"{Q}.second.weight"
    yield Case("factors: transposed", DENSIFY, weights("small", _set(first, lambda w: w.T)))
    yield Case("factors: one missing", DENSIFY, weights("small", lambda w: w.pop(second)))
    yield Case("factors: NaN", DENSIFY, weights("small", _set(first, _poisoned(float("nan")))))
    yield Case("factors: a lower rank", DENSIFY, weights("small", _set(first, lambda w: w[1:])))
    yield Case("factors: whole numbers", DENSIFY, weights("small", _set(first, lambda w: w.to(torch.int32))))
    yield Case(
        "factors: swapped", DENSIFY, weights("small", lambda w: w.update({first: w[second].clone(), second: w[first].clone()}))
    )
    yield Case(
        "weights of the dense model", DENSIFY, lambda root: shutil.copy(root / "llama" / WEIGHTS, root / "small" / WEIGHTS)
    )


RECIPES: dict[str, bytes | str] = {
    "cut short": "rate: [0.2",
    "a list": "- rate\n- 0.2\n",
    "a number": "3",
    "bytes": bytes(range(256)),
    "a rate in words": "rate: much\n",
    "an unknown scope": "rate: 0.2\nscope: nonsense\n",
    "an unknown key": "rate: 0.2\nnonsense: 1\n",
    "a negative rate": "rate: -0.2\n",
    "code": "!!python/object/apply:os.mkdir ['executed']\n",
    "deeply nested": "[" * 5_000,
    "a key twice": "rate: 0.2\nrate: [",
}


def _recipes() -> Iterator[Case]:
    for kind, content in RECIPES.items():
        yield Case(f"recipe.yaml: {kind}", EVALUATE, write("small/recipe.yaml", content))
    for kind, make in NOT_FILES.items():
        yield Case(f"recipe.yaml: {kind}", EVALUATE, replaced("small/recipe.yaml", make))


LINES: dict[str, str] = {
    "a list": '["text"]',
    "a number": "3",
    "null": "null",
    "another field": '{"story": "Once"}',
    "a field of numbers": '{"text": 3}',
    "a field of lists": '{"text": ["Once"]}',
    "an empty field": '{"text": ""}',
    "cut short": '{"text": "Once',
    "deeply nested": NESTED,
    "many digits": '{"text": ' + "9" * 10_000 + "}",
    "two in a line": '{"text": "Once"} {"text": "upon"}',
}
TEXTS: dict[str, bytes | str] = {
    "empty": "",
    "blank": " \n\t\r\n" * 1000,
    "short": "Once",
    "not UTF-8": b"Once upon a time \xff\xfe there was" * 50,
    "UTF-16": ("Once upon a time" * 50).encode("utf-16"),
    "bytes": bytes(range(256)) * 10,
    "a pickle": pickle.dumps(Evil()) + b"\xff",
}


def _texts() -> Iterator[Case]:
    rows = COMPRESS.replace("story.txt", "rows.jsonl")
    for kind, line in LINES.items():
        yield Case(f"rows: {kind}", rows, write("rows.jsonl", line + "\n"))
    yield Case("rows: not UTF-8", rows, write("rows.jsonl", b'{"text": "\xff"}\n'))
    yield Case("rows: another column", f"{rows} --text-column nonsense", write("rows.jsonl", '{"text": "Once"}\n'))
    yield Case("rows: one array", COMPRESS.replace("story.txt", "rows.json"), write("rows.json", '[{"text": "Once"}]'))
    for kind, content in TEXTS.items():
        yield Case(f"text: {kind}", COMPRESS, write("story.txt", content))
    for kind, make in NOT_FILES.items():
        yield Case(f"text: {kind}", COMPRESS, replaced("story.txt", make))
        yield Case(f"text of evaluate: {kind}", EVALUATE, replaced("story.txt", make))

    def folder(root: Path) -> None:
        (root / "texts").mkdir()
        (root / "texts/a.txt").write_bytes(b"\xff\xfe")

    yield Case("texts: a folder of bytes", COMPRESS.replace("story.txt", "texts"), folder)
    pipe = together(lambda root: (root / "texts").mkdir(), lambda root: os.mkfifo(root / "texts/a"))
    yield Case("texts: a folder of pipes", COMPRESS.replace("story.txt", "texts"), pipe)


LONG = "x" * 300
ABUSE = [
    "nonsense",
    "--nonsense",
    "compress llama --nonsense 3",
    "compress llama small",
    "compress llama --rate",
    "compress llama --rate many",
    "compress llama --rate inf",
    "compress llama --rate 1e-400",
    "compress llama --rate 1e400",
    "compress llama --seed 1.5",
    "compress llama --seed 99999999999999999999999",
    "compress llama --samples many",
    "compress llama --samples 999999999999999999999999 --length 32",
    "compress llama --length 99999999999999999999",
    "compress llama --rank-multiple 99999999999999999999",
    "compress llama --device meta",
    "compress llama --device cpu:x",
    "compress llama --device ''",
    "compress llama --dtype ''",
    "compress llama --scope ''",
    "compress llama --option =3",
    "compress llama --option rounds=-1",
    "compress llama --option rounds=1e9999",
    "compress llama --option learning_rate=nan",
    "compress llama --option learning_rate=-1",
    "compress llama --allocation ''",
    "compress llama --allocation __class__",
    "compress llama --decomposition ''",
    "compress llama --include ''",
    "compress llama --include re:[",
    f"compress llama --include {LONG}",
    "compress ''",
    "compress .",
    "compress /",
    "compress /dev/null",
    "compress /dev/zero",
    "compress -- -x",
    "compress https://example.com/model",
    "compress ../../../etc/passwd",
    "compress a/b/c/d",
    "compress mödel/😀",
    f"compress {LONG}",
    "compress llama/model.safetensors",
    "compress story.txt",
    "compress llama --calibration ''",
    "compress llama --calibration https://example.com/text.txt",
    "compress llama --calibration /dev/zero",
    f"compress llama --calibration ./{LONG}",
    f"compress llama --calibration {LONG}.txt",
    "compress llama --calibration stdlib:nonsense",
    "compress llama --calibration story.txt --dataset-option nonsense",
    "compress llama --calibration nowhere --dataset-option trust_remote_code=true",
    "compress llama -o /dev/null",
    "compress llama -o /dev/null/out",
    "compress llama -o /proc/out",
    "compress llama -o ''",
    "compress llama -o .",
    "compress llama -o ..",
    "compress llama -o /",
    f"compress llama -o {LONG}",
    f"compress llama -o {'/'.join([LONG[:200]] * 30)}",
    "densify",
    "densify small",
    "densify small -o small",
    "densify small -o .",
    "densify '' -o out",
    "densify /dev/null -o out",
    "inspect",
    "inspect ''",
    "inspect /dev/null",
    "inspect small/ranks.json",
    "evaluate small --reference ''",
    "evaluate small --reference llama --text ''",
    "evaluate small --reference llama --text story.txt --samples 1.5",
    "evaluate small --reference llama --text story.txt --seed -1",
    "evaluate small --reference llama --text story.txt --device meta",
    "compare llama",
    "compare llama --text story.txt --rates ''",
    "compare llama --text story.txt --rates 0.1,,0.2",
    "compare llama --text story.txt --rates nan",
    "compare llama --text story.txt --rates 0.1,inf",
    "compare llama --text story.txt --rates -0.1,0.2",
    "compare llama --text story.txt --rates 0.1,2",
    "compare llama --text story.txt --allocations nonsense",
    "compare llama --text story.txt --allocations llrc:nonsense",
    "compare llama --text story.txt --decompositions nonsense",
    "compare llama --text story.txt --calibration story.txt --length 32 --judge-samples 0",
    "compare llama --text story.txt -o story.txt",
    "compare nowhere --text story.txt",
    "explore llama --calibration story.txt --rates ''",
    "explore llama --calibration story.txt --rates 0.1,2",
    "explore llama --calibration story.txt --bits nan",
    "explore llama --calibration story.txt --bits 4,1",
    "explore llama --calibration story.txt --length 32 --text story.txt --judge-samples 0",
    "explore llama --calibration story.txt --target-bytes 1MB",
    "explore llama --calibration story.txt --keep *=0.5",
    "explore llama --calibration story.txt -o story.txt",
    "explore nowhere",
]


def _lines() -> Iterator[Case]:
    adapter = write("llama/adapter_config.json", '{"base_model_name_or_path": "small", "peft_type": "LORA"}')
    yield Case("a model with an adapter", COMPRESS, adapter)
    yield Case("an output that links to itself", COMPRESS, lambda root: (root / "out").symlink_to("out"))
    pandas = COMPRESS.replace("story.txt", "pandas --dataset-option data_files=evil.pkl")
    yield Case("a pickle as a data set", pandas, write("evil.pkl", pickle.dumps(Evil())))
    for line in ABUSE:
        yield Case(line if len(line) < 200 else f"{line[:60]}... of {len(line)} characters", line)


def cases() -> list[Case]:
    """All of them."""
    makers = (_json_files, _configs, _tokenizers, _safetensors, _shards, _pickles, _quantization, _compressed_weights)
    found = [case for make in (*makers, _recipes, _texts, _lines) for case in make()]
    twice = [name for name, times in Counter(case.name for case in found).items() if times > 1]
    assert not twice, twice
    return found
