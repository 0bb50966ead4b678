"""The command line end to end, on a tiny random model and on a small trained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import evaluate

FAST = ["--samples", 12, "--length", 32, "--option", "rounds=1", "--option", "value_steps=2"]
KEYS = {"rate", "scope", "parameters", "bytes", "kl", "perplexity", "reference_perplexity", "ranks"}
Run = Callable[..., Any]


def test_compress_prints_a_report(rankwise: Run, llama: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "small"
    finished = rankwise("compress", llama, "--rate", 0.3, "-o", output, "--calibration", story, *FAST)
    assert finished.code == 0, finished.err
    for wanted in ("parameters, whole model", "perplexity", "KL(original || compressed)", "lm_head", f"written to {output}"):
        assert wanted in finished.out
    assert sorted(p.name for p in output.parent.iterdir()) == ["small"]  # no run folder and no temporary one
    names = {p.name for p in output.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "ranks.json",
        "recipe.yaml",
        "report.json",
    }
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (recipe["rate"], recipe["scope"], recipe["allocation"]) == (0.3, "linear", "llrc")
    ranks = json.loads((output / "ranks.json").read_text())
    assert json.loads((output / "report.json").read_text())["ranks"] == ranks
    with safe_open(output / "model.safetensors", "pt") as weights:
        shapes = {n: tuple(weights.get_slice(f"{n}.first.weight").get_shape()) for n, r in ranks.items() if r is not None}
    assert {name: shape[0] for name, shape in shapes.items()} == {n: r for n, r in ranks.items() if r is not None}
    card = (output / "README.md").read_text()
    assert "import rankwise" in card
    assert "LlamaForCausalLM.from_pretrained" in card


def test_json_is_all_there_is_on_stdout(rankwise: Run, llama: Path, story: Path, small_llama: Path, tmp_path: Path) -> None:
    commands: list[list[Any]] = [
        ["compress", llama, "--rate", 0.3, "-o", tmp_path / "small", "--calibration", story, *FAST, "--json"],
        ["evaluate", small_llama, "--reference", llama, "--text", story, "--length", 32, "--json"],
    ]
    reports = []
    for command in commands:
        finished = rankwise(*command)
        assert finished.code == 0, finished.err
        reports.append(json.loads(finished.out))
        assert reports[-1].keys() >= KEYS
    compressed, evaluated = reports
    assert (compressed["rate"], evaluated["rate"]) == (0.3, 0.25)
    for report in reports:
        linear = report["parameters"]["linear"]
        assert linear["compressed"] <= (1 - report["rate"]) * linear["reference"]
        assert report["kl"] > 0
        assert report["perplexity"] > 1


def test_evaluate(rankwise: Run, llama: Path, small_llama: Path, story: Path) -> None:
    finished = rankwise("evaluate", small_llama, "--reference", llama, "--text", story, "--length", 32, "--samples", 5)
    assert finished.code == 0, finished.err
    assert "5 windows, 155 predicted tokens" in finished.out
    report = evaluate(small_llama, llama, str(story), length=32)
    tokens, text = AutoTokenizer.from_pretrained(llama)(story.read_text())["input_ids"], report["windows"] * 32
    windows = torch.tensor(tokens[:text]).view(-1, 32)
    for key, folder in (("reference_perplexity", llama), ("perplexity", small_llama)):
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(folder)(windows, labels=windows).loss
        assert report[key] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_inspect(rankwise: Run, small_llama: Path) -> None:
    ranks = json.loads((small_llama / "ranks.json").read_text())
    finished = rankwise("inspect", small_llama)
    assert finished.code == 0, finished.err
    assert all(name in finished.out for name in ranks)
    rows = json.loads(rankwise("inspect", small_llama, "--json").out)["matrices"]
    assert {row["matrix"]: row["rank"] for row in rows} == ranks
    assert all(row["rank"] is None or row["rank"] < row["break_even_rank"] for row in rows)


def test_densify(rankwise: Run, small_llama: Path, story: Path, tmp_path: Path) -> None:
    finished = rankwise("densify", small_llama, "-o", tmp_path / "dense")
    assert (finished.code, finished.err) == (0, "")
    ids = torch.arange(20)[None] + 3
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (small_llama, tmp_path / "dense")]
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-4, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("Once")["input_ids"]
    again = rankwise("compress", tmp_path / "dense", "-o", tmp_path / "again", "--calibration", story, *FAST)
    assert again.code == 0, again.err


def test_overwrite(rankwise: Run, llama: Path, story: Path, tmp_path: Path) -> None:
    command = ["compress", llama, "-o", tmp_path / "small", "--calibration", story, "--allocation", "uniform", *FAST[:4]]
    assert rankwise(*command).code == 0
    (tmp_path / "small" / "left-over").touch()
    assert rankwise(*command).code == 2
    assert rankwise(*command, "--overwrite", "--rate", 0.4).code == 0
    assert not (tmp_path / "small" / "left-over").exists()
    assert yaml.safe_load((tmp_path / "small" / "recipe.yaml").read_text())["rate"] == 0.4


@pytest.mark.parametrize("source", ["folder", "rows.jsonl", None])
def test_sources_of_text(rankwise: Run, llama: Path, story: Path, source: str | None, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(story.read_text()[:700])
    (tmp_path / "folder" / "b.txt").write_text(story.read_text()[700:])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"story": line}) + "\n" for line in story.read_text().split(".")))
    text = [] if source is None else ["--calibration", tmp_path / source]
    text += ["--text-column", "story"] if source == "rows.jsonl" else []
    finished = rankwise("compress", llama, "-o", tmp_path / "small", *text, *FAST, "--json")
    assert finished.code == 0, finished.err
    assert json.loads(finished.out)["windows"] == 1  # one in ten of 12


def test_a_trained_model(rankwise: Run, shared: Path, tmp_path: Path) -> None:
    """Learned ranks cost a trained model less than uniform ones, on text that neither has seen."""
    model, text = shared / "models" / "stories260k", shared / "text" / "tinystories-3000.jsonl"
    lines = text.read_text().splitlines(keepends=True)
    (tmp_path / "seen.jsonl").write_text("".join(lines[:1000]))
    (tmp_path / "unseen.jsonl").write_text("".join(lines[1000:1400]))
    size = ["--samples", 24, "--length", 128]
    options = ["--rate", 0.2, "--calibration", tmp_path / "seen.jsonl", *size, "--json"]
    kl = {}
    for allocation in ("uniform", "llrc"):
        few = ["--option", "rounds=1", "--option", "value_steps=0", "--neurons", "all"] if allocation == "llrc" else []
        folder = tmp_path / allocation
        assert rankwise("compress", model, "-o", folder, "--allocation", allocation, *few, *options).code == 0
        judged = rankwise("evaluate", folder, "--reference", model, "--text", tmp_path / "unseen.jsonl", *size, "--json")
        report = json.loads(judged.out)
        assert report["perplexity"] > report["reference_perplexity"]
        kl[allocation] = report["kl"]
    assert kl["llrc"] < 0.8 * kl["uniform"]
