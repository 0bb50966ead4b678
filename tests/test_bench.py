"""`rankwise bench`: that it runs both models and counts right. How fast they are is no test's affair."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM

from rankwise import RankwiseError
from rankwise.runtime.bench import Compiled, Load, ideal_speedup, peaks_alone, prefill, step
from rankwise.runtime.timing import alternating, ratio

FAST = ["--prompt", 8, "--new-tokens", 2, "--repeats", 1]


@pytest.mark.usefixtures("no_peaks")
def test_the_report(rankwise: Callable[..., Any], small_llama: Path, llama: Path) -> None:
    ended = rankwise("bench", small_llama, "--reference", llama, "--batches", "2,1", *FAST, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert [(row["phase"], row["batch"]) for row in report["speed"]] == [(p, b) for b in (1, 2) for p in ("prefill", "decode")]
    for row in report["speed"]:
        speed = row["tokens_per_second"]
        assert math.isclose(row["speedup"], speed["compressed"] / speed["reference"], rel_tol=1e-6)  # one repeat
        assert math.isclose(row["of_ideal"], row["speedup"] / row["ideal"])
        assert 1 < row["ideal"] < 1.5
    weights, peaks = report["weight_bytes"], report["peak_memory_bytes"]
    assert weights["compressed"] < weights["reference"]
    assert peaks == {role: {size: {"host": 10**9} for size in ("1", "2")} for role in weights}


@pytest.mark.usefixtures("no_peaks")
def test_compiled_models_are_timed_as_the_others(
    rankwise: Callable[..., Any], small_llama: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr("torch.compile", lambda model, **_: compiled.append(type(model)) or model)  # the next test compiles
    ended = rankwise("bench", small_llama, "--reference", llama, "--batches", "2,1", *FAST, "--compile")
    assert ended.code == 0, ended.err
    assert "threads, compiled" in ended.out
    assert "decode, batch 2" in ended.out
    assert len(compiled) == 4  # both models, for each load


def test_a_compiled_model_writes_what_the_model_writes(small_llama: Path) -> None:
    model, load = AutoModelForCausalLM.from_pretrained(small_llama).eval(), Load(2, 8, 4)
    ids, compiled = torch.randint(model.config.vocab_size, (2, 8)), Compiled(model, load)
    for _ in range(2):  # the cache starts anew with every prompt
        expected, found = prefill(model, ids), prefill(compiled, ids)
        for _ in range(load.new_tokens):
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
            token = expected.logits[:, -1:].argmax(-1)
            expected, found = step(model, expected, token), step(compiled, found, token)


def test_a_model_without_such_a_cache_is_refused() -> None:
    with pytest.raises(RankwiseError, match="xLSTMForCausalLM does not run compiled, with a cache of fixed size"):
        Compiled(build("xlstm").eval(), Load(1, 8, 2))


def test_peaks_are_those_of_a_process_of_its_own(small_llama: Path) -> None:
    held = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(small_llama).parameters())
    loads = [Load(1, 8, 2), Load(2, 8, 2)]
    small, large = (peak["host"] for peak in peaks_alone(small_llama, loads, 1, "auto", "cpu"))
    assert held < small <= large


@pytest.mark.usefixtures("no_peaks")
def test_without_a_reference(rankwise: Callable[..., Any], small_llama: Path) -> None:
    ended = rankwise("bench", small_llama, "--batches", "1", "--new-tokens", 2, "--repeats", 1, "--threads", 1)
    assert ended.code == 0, ended.err
    assert "decode, batch 1" in ended.out
    assert "ideal" not in ended.out
    assert f"prompt {64 - 2}, then 2" in ended.out  # as long as a small model takes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--batches", "1,x"], "separate them by commas"),
        (["--batches", "0"], "1 or more"),
        (["--prompt", "63", "--new-tokens", "2"], "ask for fewer"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_bad_options(rankwise: Callable[..., Any], small_llama: Path, options: list[str], complaint: str) -> None:
    ended = rankwise("bench", small_llama, *options)
    assert ended.code == 2
    assert complaint in ended.err
    assert "Traceback" not in ended.err


def test_the_ideal_counts_what_is_multiplied(small_llama: Path, llama: Path) -> None:
    dense, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (llama, small_llama))
    assert ideal_speedup(dense) == {"prefill": 1, "decode": 1}
    rows = {
        model: sum(m.weight.numel() for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head")
        for model in (dense, small)
    }
    head = dense.lm_head.weight.numel()
    expected = {"prefill": rows[dense] / rows[small], "decode": (rows[dense] + head) / (rows[small] + head)}
    assert ideal_speedup(small) == pytest.approx(expected)


def test_tasks_take_turns() -> None:
    calls: list[str] = []
    seconds = alternating([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4
    assert [len(own) for own in seconds] == [3, 3]
    assert ratio([2, 6, 5], [1, 2, 1]) == 3
