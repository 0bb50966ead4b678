"""`rankwise explore`: points are what their commands make, found once, and what it concludes follows from them."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_report import Page, at
from transformers import AutoTokenizer

from rankwise import RankwiseError, explore, report, stages
from rankwise.evaluation.frontier import answers, knee
from rankwise.exploring import EXPLORED, price_of_next
from rankwise.layers.matrices import Shape

QUICK: dict[str, Any] = {"rates": [0.2, 0.4], "bits": [4, 2.5], "samples": 12, "length": 32}
WORK = ("stages.collect", "stages.decompose_in", "few_bits.roundings", "stages.compare", "starting.own_windows")


def found_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / EXPLORED).read_text()))


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORK:
        monkeypatch.setattr(f"rankwise.{name}", lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("asked", ["--rate", "--bits"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one of a kind", "every"])
def test_a_point_is_what_its_command_makes(
    asked: str, every: bool, explored: Path, rankwise: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points = [point for point in found_in(explored)["points"] if asked in (point["command"] or "")]
    assert points
    for point in points if every else {point["series"]: point for point in points}.values():
        program, *arguments = shlex.split(point["command"])
        assert program == "rankwise"
        finished = rankwise(*arguments)
        assert finished.code == 0, finished.err
        made = json.loads((tmp_path / arguments[-1] / "report.json").read_text())
        assert made["kl"] == point["kl"]
        assert made["perplexity"] == point["perplexity"]
        size = made["bytes"]["model"]
        assert size["compressed"] == point["bytes"]
        assert size["compressed"] / size["reference"] == point["share"]


def test_every_size_and_way_is_there_and_one_of_each_size_has_a_command(explored: Path) -> None:
    points = found_in(explored)["points"]
    assert (points[0]["kl"], points[0]["share"], points[0]["command"]) == (0, 1, None)
    same = [p for p in points if p["series"] == "same bits everywhere"]
    assert same[0]["label"] == "4 bits"
    assert all(f"--bits {p['label'].removesuffix(' bits')} " in p["command"] for p in same)
    low_rank = [p for p in points if p["series"] == "low rank"]
    assert [p["rate"] for p in low_rank] == [0.2, 0.4]
    assert low_rank[0]["kl"] < low_rank[1]["kl"]
    for point in [points[0], *low_rank]:
        assert set(point["next_per_cent"]) == set(points[0]["next_per_cent"])
        assert all(price >= 0 and math.isfinite(price) for price in point["next_per_cent"].values())
        assert point["speedup"] > 0
    for bits in (4, 2.5):
        plans = [p for p in points if p.get("bits") == bits]
        assert sum(p["command"] is not None for p in plans if p not in same) <= 1
        assert any(p["command"] for p in plans)
        assert all(p["speedup"] > 0 for p in plans)
    assert all(p["bytes"] <= same[0]["bytes"] for p in points if p.get("bits") == 4)


def test_nothing_is_computed_again(
    explored: Path, llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = shutil.copytree(explored, tmp_path / "again")
    (again / EXPLORED).unlink()
    compare, decompose_in = stages.compare, stages.decompose_in
    forbid_work(monkeypatch)
    first = found_in(explored)
    same = explore(llama, calibration=str(story), output=again, **QUICK)
    for measured in ("points", "answers"):
        assert same[measured] == first[measured] == found_in(again)[measured]
    measured = []
    monkeypatch.setattr(stages, "compare", lambda *given: measured.append(given) or compare(*given))
    monkeypatch.setattr(stages, "decompose_in", decompose_in)  # of what is narrower at the new rate
    more = explore(llama, calibration=str(story), output=again, **QUICK | {"rates": [0.2, 0.3, 0.4]})
    assert len(measured) == 1
    assert [p for p in more["points"] if p.get("rate") != 0.3][1:] == first["points"][1:]


def test_texts_are_judged_on(llama: Path, story: Path, explored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Numbers: " + " ".join(str(i * i) for i in range(400)))
    folder = shutil.copytree(explored, tmp_path / "out")
    options = QUICK | {"rates": [0.2], "bits": [4], "judge_samples": 4, "effort": "default"}
    found = explore(llama, text=[str(other), str(story)], calibration=str(story), output=folder, **options)
    assert found["text"] == str(other)
    for point in found["points"]:
        assert list(point["texts"]) == [str(other), str(story)]
        assert point["kl"] == point["texts"][str(other)]["kl"]
    assert found["points"][1]["kl"] != found["points"][1]["texts"][str(story)]["kl"]
    (low_rank,) = (point for point in found["points"] if point["series"] == "low rank")
    assert "--allocation llrc:quick" in low_rank["command"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rates": [0.2, 0.9999]}, r"rate=0\.9999 cannot be reached"),
        ({"rates": [0.2, 1.5]}, r"rate=1\.5"),
        ({"rates": [math.nan]}, "rate=nan"),
        ({"bits": [4, 9]}, "bits=9 must lie between 2 and 8"),
        ({"rates": [], "bits": []}, "nothing to explore"),
        ({"nonsense": 1}, "unknown option 'nonsense'"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"judge_samples": 0, "text": "stdlib:held-out"}, "samples=0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(
    wrong: dict[str, Any], said: str, llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    with pytest.raises(RankwiseError, match=said) as refused:
        explore(llama, **QUICK | {"calibration": str(story), "output": tmp_path / "out"} | wrong)
    assert "\n" not in str(refused.value)


def test_a_text_needs_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_work(monkeypatch)
    build("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(RankwiseError, match="no tokenizer"):
        explore(tmp_path / "model", text="stdlib:held-out", output=tmp_path / "out", **QUICK)


def test_an_encoder_has_no_perplexity_and_no_speed(llama: Path, story: Path, tmp_path: Path) -> None:
    build("bert-mlm").save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "model")
    found = explore(tmp_path / "model", calibration=str(story), output=tmp_path / "out", **QUICK)
    assert {(point["perplexity"], point["speedup"]) for point in found["points"]} == {(None, None)}
    assert "no speed is predicted" in found["notes"][-1]
    report([tmp_path / "out"], tmp_path / "page.html")
    assert Page(tmp_path / "page.html").data["explored"] == [found]


def test_the_command_prints_what_it_writes(
    rankwise: Callable[..., Any], explored: Path, llama: Path, story: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(explored, tmp_path / "out")
    line = ["explore", llama, "--calibration", story, "--rates", "0.2,0.4", "--bits", "4,2.5"]
    line += ["--samples", 12, "--length", 32]
    finished = rankwise(*line, "-o", folder, "--json")
    assert finished.code == 0, finished.err
    assert json.loads(finished.out) == found_in(folder)
    finished = rankwise(*line, "-o", folder)
    for wanted in ("low rank", "same bits everywhere", "rate 0.4", "2.5 bits", "report.html"):
        assert wanted in finished.out


def test_the_pages_figures_are_those_of_the_json(explored: Path) -> None:
    page, found = Page(explored / "report.html"), found_in(explored)
    assert page.data["explored"] == [found]
    assert len(page.figures) > 100
    for path, value, _ in page.figures:
        assert value == at(page.data, path)
    shown = {path.removeprefix("/explored/0/points/") for path, *_ in page.figures}
    for index, point in enumerate(found["points"]):
        assert {f"{index}/bytes", f"{index}/kl", f"{index}/perplexity"} <= shown
        assert point["command"] is None or point["command"] in page.text
    assert all(address.startswith(("#", "data:")) for address in page.addresses)


def point(
    curve: str, kl: float | None, share: float, speedup: float | None = None, command: str | None = "rankwise"
) -> dict[str, Any]:
    return {"command": command, "curves": [curve], "kl": kl, "share": share, "bytes": int(1000 * share), "speedup": speedup}


POINTS = [
    point("original", 0.0, 1.0, 1.0),
    point("a", 0.02, 0.9, 1.1),
    point("a", 0.30, 0.8, 1.3),
    point("b", 0.001, 0.5),
    point("b", 0.2, 0.25),
    point("b", None, 0.1),
    point("c", 0.5, 0.9),
]


def test_the_knee_is_the_last_point_before_a_per_cent_costs_more_than_a_per_cent() -> None:
    found = answers(POINTS)
    assert found["knees"] == {"a": 1, "b": 4, "c": 0}
    assert found["best_knee"] == 4
    yardstick = point("d", 0.0, 0.1, command=None)
    assert answers([*POINTS, yardstick])["best_knee"] == 4  # what no command makes is not recommended
    further = [*POINTS, point("a", 5.0, 0.05)]
    assert knee(further, [0, 1, 2, len(POINTS)]) == 1


def test_answers_are_points_that_were_measured() -> None:
    found = answers(POINTS)
    under = {row["kl"]: row["points"] for row in found["under"]}
    assert under[0.01] == {"a": 0, "b": 3, "c": 0}
    assert under[1.0] == {"a": 2, "b": 4, "c": 6}
    within = {row["bytes"]: row["points"] for row in found["within"]}
    assert within[900] == {"a": 1, "b": 3, "c": 6}
    assert within[100] == {"a": None, "b": 5, "c": None}
    assert POINTS[found["cheapest_byte"]]["share"] == 0.5
    assert POINTS[found["cheapest_speed"]]["speedup"] == 1.1


def test_a_size_that_is_missed_by_a_hair_is_reached() -> None:
    points = [point("o", 0, 1), point("a", 0.1, 0.5), point("b", 0.3, 0.4), point("b", 0.05, 0.502), point("b", 0.01, 0.51)]
    assert {row["bytes"]: row["points"]["b"] for row in answers(points)["within"]}[500] == 3


def test_the_next_per_cent_is_that_of_the_cheapest_components() -> None:
    shape, prices = Shape(10, 10, form="pair"), torch.arange(10, 0, -1, dtype=torch.float64)
    mask = (prices > 6).float()
    assert price_of_next(shape, prices, mask) == pytest.approx(0.01 * 80 / 20 * 7)  # a unit of rank is a quarter of all
    assert price_of_next(shape, prices, None) == pytest.approx(0.01 * 100 / 20 * (1 + 2 + 3 + 4 + 5 + 6))
