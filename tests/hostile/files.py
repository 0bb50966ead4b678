"""Malformed JSON, configs and tokenizers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from hostile.case import (
    COMPRESS,
    DENSIFY,
    DROP,
    EVIL_CODE,
    INSPECT,
    NOT_FILES,
    NOT_JSON,
    Case,
    edited,
    merged,
    replaced,
    sharded,
    together,
    write,
)


def json_files() -> Iterator[Case]:
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


def configs() -> Iterator[Case]:
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


def tokenizers() -> Iterator[Case]:
    for kind, change in TOKENIZERS.items():
        yield Case(f"tokenizer with {kind}", COMPRESS, edited("llama/tokenizer.json", change))
