"""`rankwise compare`: the same statistics for all, options per method, nothing computed twice, every text judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import build
from transformers import AutoTokenizer

from rankwise import RankwiseError, compress, contest, stages, starting
from rankwise.allocation.kl_knapsack import KLKnapsack
from rankwise.allocation.uniform import Uniform
from rankwise.contest import all_allocations, hold_contest, methods_of
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder

QUICK = {"samples": 12, "length": 32, "judge_samples": 4}
METHODS = ["uniform", "kl-knapsack points=2 trials=1", "llrc rounds=1 value_steps=0", "llrc rounds=1 value_steps=2"]


def test_a_method_takes_a_preset_and_options() -> None:
    (method,) = methods_of(["kl-knapsack points=3"], ["whitened"])
    assert method.allocator == KLKnapsack(points=3)
    assert method.label == "kl-knapsack points=3 on whitened"
    assert len(methods_of(all_allocations(), ["svd", "centred"])) == 2 * len(all_allocations())
    for wrong in ("nonsense", "llrc:nonsense", "uniform points=3", "llrc rounds", "kl-knapsack points=none"):
        with pytest.raises(RankwiseError):
            methods_of([wrong], [])


def test_judged_on_every_text_within_the_budget_and_not_computed_again(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Numbers: " + " ".join(str(i * i) for i in range(400)))

    def contest_of(rates: list[float]) -> list[dict[str, Any]]:
        return hold_contest(
            llama,
            rates,
            [str(story), str(other)],
            tmp_path / "out",
            allocations=METHODS,
            decompositions=["kronecker", "centred"],
            calibration=str(story),
            **QUICK,
        )

    first = contest_of([0.2])
    assert len(first) == 2 * len(METHODS)
    for row in first:
        assert row["kept_parameters"] <= row["budget"]
        assert set(row["texts"]) == {str(story), str(other)}
        assert row["kl"] == row["texts"][str(story)]["kl"] != row["texts"][str(other)]["kl"]
        assert all(0 < kept <= 1 for kept in row["kept"].values())
    computed = []
    decompose_in, true_compare = stages.decompose_in, stages.compare
    for name in ("collect", "decompose_in"):
        monkeypatch.setattr(stages, name, lambda *_, name=name: pytest.fail(f"{name} was called again"))
    assert contest_of([0.2]) == first
    monkeypatch.setattr(stages, "decompose_in", decompose_in)  # of what is narrower at the new rate
    monkeypatch.setattr(stages, "compare", lambda *given: computed.append(given) or true_compare(*given))
    both = contest_of([0.2, 0.4])
    assert [row for row in both if row["rate"] == 0.2] == first
    assert 2 <= len(computed) <= 2 * len(METHODS) * 2  # the new rate alone, on both texts; equal plans once
    assert json.loads((tmp_path / "out" / contest.RESULTS).read_text()) == both


def test_effort_is_told_as_if_nothing_had_been_kept(llama: Path, story: Path, tmp_path: Path) -> None:
    def effort(output: str, *methods: str) -> dict[str, Any]:
        rows = hold_contest(llama, [0.3], [str(story)], tmp_path / output, allocations=methods, calibration=str(story), **QUICK)
        return dict(rows[-1]["effort"])

    alone, after = effort("alone", METHODS[2]), effort("after", "mask-fisher", METHODS[2])
    assert alone.pop("seconds") > 0
    assert after.pop("seconds") > 0
    assert alone == after


def test_the_command_prints_a_table_for_each_text_and_draws(
    rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path
) -> None:
    options = ["--samples", 12, "--length", 32, "--judge-samples", 4, "--allocations", "uniform, energy", "--rates", "0.2,0.3"]
    other = tmp_path / "other.txt"
    other.write_text("Numbers: " + " ".join(str(i * i) for i in range(400)))
    finished = rankwise(
        "compare", llama, "--text", story, "--text", other, "--calibration", story, "-o", tmp_path / "out", *options
    )
    assert finished.code == 0, finished.err
    for wanted in ("uniform on whitened", "energy on", "story.txt", "other.txt", "rate 0.2", "rate 0.3"):
        assert wanted in finished.out
    assert "uniform on whitened" in (tmp_path / "out" / "report.html").read_text()


def test_what_was_spared_before_does_not_count(llama: Path, story: Path) -> None:
    recipe = Recipe.of(rate=0.3, calibration=str(story), samples=12, length=32)
    run = starting.start(llama, str(story), None, recipe, [0.3], RunFolder())
    student = stages.student_of(run, stages.decompose_all(run, stages.collect_statistics(run, frozenset()), "svd"), "svd")
    student.spared = 1e6
    chosen = stages.allocate(run, student, "svd", Uniform(), starting.budget_of(run, recipe, 0.3))
    assert 0 <= chosen.effort["seconds"] < 1e5


def test_a_rate_means_what_it_means_in_compress_where_text_does_not_reach_every_expert(
    llama: Path, story: Path, tmp_path: Path
) -> None:
    build("mixtral", num_local_experts=16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"calibration": str(story), "samples": 3, "length": 8}
    (row,) = hold_contest(
        tmp_path / "model", [0.2], [str(story)], tmp_path / "out", allocations=["uniform"], judge_samples=2, **options
    )
    alone = compress(tmp_path / "model", 0.2, allocation="uniform", **options)
    assert "the calibration text does not reach it" in alone.report["left_dense"].values()
    assert row["ranks"] == alone.ranks
    assert row["kept_parameters"] == alone.report["parameters"]["linear"]["compressed"] <= row["budget"]


def test_a_rate_out_of_reach_is_refused_before_the_long_work(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "collect", lambda *_: pytest.fail("the long work has begun"))
    with pytest.raises(RankwiseError, match=r"rate=0\.999 cannot be reached"):
        hold_contest(llama, [0.2, 0.999], [str(story)], tmp_path / "out", calibration=str(story), **QUICK)
