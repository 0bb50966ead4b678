"""Malformed recipes and texts, and command lines."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from hostile.case import (
    COMPRESS,
    EVALUATE,
    NESTED,
    NOT_FILES,
    Case,
    Evil,
    replaced,
    together,
    write,
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


def recipes() -> Iterator[Case]:
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


def texts() -> Iterator[Case]:
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


def lines() -> Iterator[Case]:
    adapter = write("llama/adapter_config.json", '{"base_model_name_or_path": "small", "peft_type": "LORA"}')
    yield Case("a model with an adapter", COMPRESS, adapter)
    yield Case("an output that links to itself", COMPRESS, lambda root: (root / "out").symlink_to("out"))
    pandas = COMPRESS.replace("story.txt", "pandas --dataset-option data_files=evil.pkl")
    yield Case("a pickle as a data set", pandas, write("evil.pkl", pickle.dumps(Evil())))
    for line in ABUSE:
        yield Case(line if len(line) < 200 else f"{line[:60]}... of {len(line)} characters", line)
