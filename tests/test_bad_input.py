"""What users get wrong ends in one line and exit code 2, before any long work, with nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file

# command line, and what the message says; the folder that they run in is made by `bad`
CASES = [
    ("compress nowhere", "no such model.*nowhere"),
    ("compress text", "no such model.*text"),
    ("compress story.txt", "no such model.*story.txt"),
    ("compress broken-config", "cannot load broken-config: its config.json"),
    ("compress nan", "NaN"),
    ("compress truncated", "cannot load truncated"),
    ("compress missing", "missing keys: .*down_proj"),
    ("compress unexpected", "unexpected keys: model.layers.2.mlp.up_proj.weight"),
    ("compress no-weights", "cannot load no-weights"),
    ("compress small", "already compressed"),
    ("compress quantized", "quantized .*gptq"),
    ("compress mxfp4", "quantization_config=Mxfp4Config\\(dequantize=True\\) and compress\\(\\) it in memory"),
    ("compress llama --calibration nowhere.txt", "no such text.*nowhere.txt"),
    ("compress llama --calibration ./nowhere", "no such text.*nowhere"),
    ("compress llama --calibration nowhere", "no such text.*nowhere"),
    ("compress llama --calibration empty.txt", "empty"),
    ("compress llama --calibration empty", "empty"),
    ("compress llama --calibration short.txt", "fewer than one window"),
    ("compress llama --calibration story.txt --length 1000", "length=1000.*64"),
    ("compress llama --calibration binary.txt", "binary.txt is not UTF-8"),
    ("compress llama --calibration broken.jsonl", "broken.jsonl, line 2"),
    ("compress llama --calibration rows.jsonl", "rows.jsonl, line 1.*'text'"),
    ("compress llama --calibration rows.jsonl --text-column number", "line 1.*'number' is neither text"),
    ("compress llama --calibration story.txt --text-column story", "text_column='story'.*remove it"),
    (
        "compress llama --calibration rows.jsonl --dataset-option split=test",
        "dataset_options \\(split=test\\).*remove them",
    ),
    ("compress llama --text-column story", "text_column='story'.*remove it"),
    (
        "decompose llama --calibration story.txt --text-column story -o new/out",
        "text_column='story'.*remove it",
    ),
    (
        "evaluate small --reference llama --text story.txt --text-column story",
        "text_column='story'.*remove it",
    ),
    ("compare llama --text story.txt --text-column story -o new/out", "text_column='story'.*remove it"),
    ("compress no-tokenizer --calibration story.txt", "no tokenizer"),
    ("compress foreign-tokenizer --calibration story.txt", "tokenizer the model's own"),
    ("compress bert", "cannot write its own calibration text"),
    ("compress llama --rate 0", "rate=0"),
    ("compress llama --rate 1", "rate=1"),
    ("compress llama --rate -0.1", "rate=-0.1"),
    ("compress llama --rate 1.5", "rate=1.5"),
    ("compress llama --rate nan", "rate=nan"),
    ("compress llama --rate 0.9999", "cannot be reached.*at most 0.9"),
    ("compress llama --rank-multiple 64", "no matrix to compress.*too small"),
    ("compress llama --rank-multiple 0", "rank_multiple=0"),
    ("compress llama --scope everything", "scope='everything'.*linear"),
    ("compress llama --samples 0", "samples=0"),
    ("compress llama --length 1", "length=1"),
    ("compress llama --seed -1", "seed=-1"),
    ("compress llama --dtype float8", "dtype='float8'.*bfloat16"),
    ("compress llama --device nonsense", "device 'nonsense' cannot be used"),
    ("compress llama --device cuda:77", "device 'cuda:77' cannot be used"),
    ("compress llama --allocation magic", "unknown allocation 'magic'; there are .*uniform.*llrc"),
    ("compress llama --decomposition magic", "unknown decomposition 'magic'; there are .*whitened"),
    ("compress llama --preset magic", "no preset 'magic'; it has default, quick, paper"),
    ("compress llama --option magic=1", "magic.*its options are .*rounds"),
    ("compress llama --option rounds=many", "rounds.*its options are .*rounds"),
    ("compress llama --option rounds", "'rounds' must be written as KEY=VALUE"),
    ("compress llama --include nothing*", "'nothing\\*' matches none"),
    ("compress llama --exclude nothing*", "'nothing\\*' matches none"),
    ("compress llama --include re:(", "'re:\\(' is no regular expression"),
    ("compress llama --exclude *", "no matrix to compress"),
    ("compress llama -o text", "does not hold a model|not empty"),
    ("compress llama -o taken", "not empty.*--overwrite"),
    ("compress llama -o text --overwrite", "does not hold a model"),
    ("compress llama -o llama --overwrite", "holds the model llama itself"),
    ("compress llama -o interrupted", "an interrupted run is in .*--resume"),
    ("compress llama -o story.txt", "is a file"),
    ("compress llama -o story.txt/below", "story.txt"),
    ("compress llama -o read-only/out", "read-only"),
    ("evaluate nowhere --reference llama --text story.txt", "nowhere has no ranks.json"),
    ("evaluate llama --reference llama --text story.txt", "llama has no ranks.json"),
    ("evaluate small --reference nowhere --text story.txt", "no such model.*nowhere"),
    ("evaluate small --reference small --text story.txt", "already compressed"),
    ("evaluate small --reference bert --text story.txt", "not the model that small was made from"),
    ("evaluate small --reference other-size --text story.txt", "not the model that small was made from"),
    ("evaluate small --reference other-weights --text story.txt", "not the model that small was made from"),
    ("evaluate small --reference llama --text nowhere.txt", "no such text"),
    ("evaluate small --reference llama --text empty.txt", "empty"),
    ("evaluate small --reference llama --text short.txt", "fewer than one window"),
    ("evaluate small --reference llama --text self", "no such text: 'self'"),
    ("evaluate small --reference llama --text story.txt --length 1000", "length=1000.*64"),
    ("evaluate small --reference llama --text story.txt --length -1", "length=-1"),
    ("evaluate small --reference llama --text story.txt --samples 0", "samples=0"),
    ("evaluate small --reference llama --text story.txt --dtype float8", "unknown dtype 'float8'"),
    ("evaluate small --reference llama --text story.txt --device nonsense", "device 'nonsense'"),
    ("evaluate edited-negative --reference llama --text story.txt", "ranks.json is not an object"),
    ("evaluate edited-unknown --reference llama --text story.txt", "model.nonsense"),
    ("evaluate edited-other --reference llama --text story.txt", "was edited"),
    ("compare llama --text short.txt -o new/out", "fewer than one window"),
    ("compare no-tokenizer --text story.txt -o new/out", "no tokenizer"),
    ("explore llama --text short.txt -o new/out", "fewer than one window"),
    ("explore no-tokenizer --text story.txt -o new/out", "no tokenizer"),
    ("refine small --reference llama --text short.txt -o new/out", "fewer than one window"),
    ("refine small --reference other-weights -o new/out", "not the model that small was made from"),
    ("compress llama --target-bytes 1KB", "cannot be reached"),
    ("compress llama --target-bytes 1KB --bits mixed", "cannot be reached"),
    ("inspect nowhere", "nowhere has no ranks.json"),
    ("inspect llama", "llama has no ranks.json"),
    ("inspect edited-negative", "ranks.json is not an object"),
    ("inspect edited-string", "ranks.json is not an object"),
    ("inspect edited-list", "ranks.json is not an object"),
    ("inspect edited-text", "ranks.json cannot be read"),
    ("inspect edited-unknown", "model.nonsense"),
    ("inspect edited-dense-unknown", "model.nonsense"),
    ("inspect edited-other", "was edited"),
    ("densify nowhere -o out", "no such model.*nowhere"),
    ("densify llama -o new/out", "llama was not written by rankwise"),
    ("densify small -o taken", "not empty.*--overwrite"),
    ("densify small -o small --overwrite", "holds the model small itself"),
    ("densify small-truncated -o out", "cannot load small-truncated"),
    ("densify newer -o out", "format 99.*upgrade"),
]


@pytest.fixture(scope="module")
def bad(llama: Path, small_llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that can be wrong."""
    root = tmp_path_factory.mktemp("bad")
    shutil.copy(story, root / "story.txt")

    def copy(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, root / name))

    def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def change_json(file: Path, change: Callable[[Any], Any]) -> None:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    copy(llama, "llama"), copy(small_llama, "small"), copy(llama, "taken")
    name = "model.layers.0.mlp.down_proj"
    change_weights(copy(llama, "nan"), lambda w: w[f"{name}.weight"].view(-1)[7].fill_(float("nan")))
    change_weights(copy(llama, "missing"), lambda w: w.pop(f"{name}.weight"))
    change_weights(copy(llama, "unexpected"), lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}))
    for source, folder in ((llama, "truncated"), (small_llama, "small-truncated")):
        os.truncate(copy(source, folder) / "model.safetensors", 5000)
    (copy(llama, "no-weights") / "model.safetensors").unlink()
    (copy(llama, "broken-config") / "config.json").write_text("{")
    change_json(copy(llama, "quantized") / "config.json", lambda c: c | {"quantization_config": {"quant_method": "gptq"}})
    change_json(copy(llama, "mxfp4") / "config.json", lambda c: c | {"quantization_config": {"quant_method": "mxfp4"}})
    change_json(
        copy(small_llama, "newer") / "config.json",
        lambda c: c | {"quantization_config": c["quantization_config"] | {"format_version": 99}},
    )
    for file in copy(llama, "no-tokenizer").glob("token*"):
        file.unlink()
    change_json(
        copy(llama, "foreign-tokenizer") / "tokenizer.json",
        lambda t: t | {"model": t["model"] | {"vocab": {c: i * 100 for c, i in t["model"]["vocab"].items()}}},
    )
    build("bert").save_pretrained(copy(llama, "bert"))
    build("llama", num_hidden_layers=1).save_pretrained(copy(llama, "other-size"))
    change_weights(copy(llama, "other-weights"), lambda w: w["model.embed_tokens.weight"].mul_(2))
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "negative": lambda r: r | {name: -3},
        "string": lambda r: r | {name: "many"},
        "list": lambda r: list(r),
        "other": lambda r: r | {name: r[name] + 1},
        "unknown": lambda r: r | {"model.nonsense": 4},
        "dense-unknown": lambda r: r | {"model.nonsense": None},
    }
    for edit, change in edits.items():
        change_json(copy(small_llama, f"edited-{edit}") / "ranks.json", change)
    (copy(small_llama, "edited-text") / "ranks.json").write_text("q_proj: 3")

    (root / "empty.txt").write_text(" \n")
    (root / "short.txt").write_text("Once")
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "broken.jsonl").write_text('{"text": "Once"}\n{"text": \n')
    (root / "rows.jsonl").write_text('{"story": "Once", "number": 3}\n')
    (root / "empty").mkdir()
    (root / "interrupted.run").mkdir()
    (root / "text").mkdir()
    shutil.copy(story, root / "text")
    (root / "read-only").mkdir(mode=0o555)
    return root


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_bad_input(line: str, message: str, bad: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "read-only" in line and os.access(bad / "read-only", os.W_OK):
        pytest.skip("root may write everywhere")

    def long_work(*_: Any, **__: Any) -> None:
        pytest.fail("the long work has begun")

    for where in ("stages.collect_statistics", "starting.own_windows", "evaluation.pair.compare"):
        monkeypatch.setattr(f"rankwise.{where}", long_work)
    monkeypatch.chdir(bad)
    arguments = line.split()
    if arguments[0] == "compress" and "-o" not in arguments:
        arguments += ["-o", "new/out"]
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*")}
    finished = rankwise(*arguments)
    assert finished.code == 2, finished
    assert finished.out == ""
    assert finished.err.startswith("error: ")
    assert len(finished.err.splitlines()) == 1
    assert re.search(message, finished.err)
    assert {path: path.stat().st_mtime_ns for path in bad.rglob("*")} == before
