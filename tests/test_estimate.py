"""How long a run takes is said before it starts, and how much text it reads is one dial."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rankwise as package
from rankwise.calibration.tokens import text_of, window_length
from rankwise.errors import RankwiseError
from rankwise.estimate import Estimate


@pytest.mark.parametrize(
    ("effort", "parameters", "device", "tokens"),
    [
        ("default", 1_000_000, "cpu", 2**18),
        ("default", 9_000_000, "cpu", 61_083),
        ("default", 135_000_000, "cpu", 28_672),
        ("default", 7_000_000_000, "cuda", 2**18),
        ("quick", 1_000_000, "cpu", 2**15),
        ("quick", 135_000_000, "cpu", 12_288),
        ("thorough", 7_000_000_000, "cpu", 2**18),
    ],
)
def test_text_of_an_effort(effort: str, parameters: int, device: str, tokens: int) -> None:
    assert text_of(effort, parameters, device) == tokens


def test_windows_are_rather_shorter_than_fewer() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"max_position_embeddings": 8192})()  # type: ignore[assignment]
    assert window_length(model) == 2048
    assert window_length(model, text=2**15) == 256
    assert window_length(model, text=2**12) == 128
    assert window_length(model, 2048, text=2**12) == 2048


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(RankwiseError, match="effort='lazy'"):
        package.compress(None, 0.2, effort="lazy")


def test_what_is_left_keeps_the_pace_of_what_is_over() -> None:
    estimate = Estimate({"calibration": 60.0, "decomposition": 30.0, "allocation": 600.0}, {})
    assert str(estimate) == "about 11:30 to go (calibration 01:00, decomposition 00:30, allocation 10:00)"
    estimate.after("calibration", 120.0)
    assert str(estimate) == "about 21:00 to go (decomposition 01:00, allocation 20:00)"


@pytest.mark.parametrize(("expected", "taken"), [(60.0, 0.5), (0.0, 0.0), (0.0, 3.0)])
def test_a_stage_that_was_found_or_expected_to_take_nothing_sets_no_pace(expected: float, taken: float) -> None:
    estimate = Estimate({"calibration": expected, "allocation": 600.0}, {})
    estimate.after("calibration", taken)
    assert str(estimate) == "about 10:00 to go (allocation 10:00)"


def test_said_before_the_work_and_after_each_stage(
    rankwise: Callable[..., object], llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    done = rankwise("compress", llama, "--calibration", story, "--samples", 12, "--length", 32, "-o", tmp_path / "out")
    lines = done.err.splitlines()  # type: ignore[attr-defined]
    said = [number for number, line in enumerate(lines) if re.match(r"about \d\d:\d\d to go", line)]
    assert said[0] < next(number for number, line in enumerate(lines) if line.startswith("calibrating"))
    assert len(said) == 6


def test_the_same_bits_everywhere_are_estimated_without_what_is_left_out(
    rankwise: Callable[..., object], llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr("rankwise.estimate.SOLVED", 1.0)  # operations a second: what is to be solved takes hours
    text = ["--calibration", story, "--samples", 12, "--length", 32]
    said = {}
    for number, asked in enumerate([["--rate", "0.2", "--allocation", "uniform"], ["--bits", 4]]):
        done = rankwise("compress", llama, *asked, *text, "-o", tmp_path / str(number))
        said[number] = next(line for line in done.err.splitlines() if line.startswith("about "))  # type: ignore[attr-defined]
    assert "decomposition" in said[0]
    assert "decomposition" not in said[1]
    assert "allocation" in said[1]  # GPTQ


def test_paths_are_estimated_to_take_longer_than_whole_numbers(
    rankwise: Callable[..., object], llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr("rankwise.estimate.SOLVED", 1e4)
    seconds = []
    for bits in (4, 3):
        asked = ["--bits", bits, "--calibration", story, "--samples", 12, "--length", 32, "-o", tmp_path / str(bits)]
        line = next(line for line in rankwise("compress", llama, *asked).err.splitlines() if line.startswith("about "))  # type: ignore[attr-defined]
        parts = line.removeprefix("about ").split(" to go")[0].split(":")
        seconds.append(sum(60**i * int(part) for i, part in enumerate(reversed(parts))))
    assert seconds[1] > 2 * seconds[0] > 0


@pytest.mark.page
def test_a_quick_run_leaves_out_what_each_matrix_costs_alone(llama: Path, story: Path, tmp_path: Path) -> None:
    options = {"calibration": story, "samples": 12, "length": 32, "allocation": "uniform", "output": tmp_path / "out"}
    report = package.compress(llama, 0.3, effort="quick", **options).report
    assert report["costs"] == {"tokens": 0, "kl": {}}
    page = (tmp_path / "out" / "report.html").read_text()
    assert next(iter(report["ranks"])) in page
    assert "alone costs" not in page
    del options["output"]
    assert package.compress(llama, 0.3, **options).report["costs"]["kl"].keys() == {
        name for name, rank in report["ranks"].items() if rank is not None
    }
