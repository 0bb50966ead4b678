"""A bar on a terminal, plain lines in a pipe, and nothing else there; interrupted work says how to go on."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import forked
from safetensors.torch import load_file, save_file

from rankwise import progress
from rankwise.contest import RESULTS

LINE = re.compile(r"[a-z].* \.\.\.|[a-z].*: (done|stopped after \d+ of \d+), \d+\.\d s")
FAST = ["--samples", "12", "--length", "32", "--option", "rounds=1", "--option", "value_steps=2"]


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE")


@pytest.mark.usefixtures("loud")
def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.progress([1, 2, 3], "counting")) == [1, 2, 3]
    first, last = capsys.readouterr().err.splitlines()
    assert first == "counting ..."
    assert re.fullmatch(r"counting: done, \d\.\d s", last)


@pytest.mark.usefixtures("loud")
def test_a_line_a_minute_says_how_long_still(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    for item in progress.progress(range(4), "counting"):
        if item == 3:
            break
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting ..."
    assert any(re.fullmatch(r"counting: \d of 4, \d\d:\d\d to go", line) for line in lines[1:-1])
    assert lines[-1].startswith("counting: stopped after 3 of 4, ")


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.progress(iter("ab"), "counting")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def compressing(llama: Path, story: Path, output: Path) -> list[str]:
    return ["compress", str(llama), "--output", str(output), "--calibration", str(story), *FAST]


@pytest.mark.usefixtures("loud")
def test_a_pipe_gets_plain_lines(llama: Path, story: Path, tmp_path: Path) -> None:
    out, err = forked(tmp_path, *compressing(llama, story, tmp_path / "small"), "-v", "--json").communicate()
    assert json.loads(out)["kl"] > 0
    assert "\r" not in err
    lines = err.splitlines()
    stages = [line for line in lines if LINE.fullmatch(line)]
    told = [line for line in lines if line not in stages]
    for doing in ("loading", "calibrating", "decomposing", "pricing components", "training mask values", "measuring", "writing"):
        assert any(line.startswith(doing) for line in stages), doing
    assert any("on the selection text" in line for line in told)  # -v
    known = r".* took \d+\.\d s|.*: KL \d+\.\d+ on the selection text|about \d\d:\d\d to go.*"
    assert all(re.fullmatch(known, line) for line in told), told
    assert sum(line.endswith(" ...") for line in stages) * 2 == len(stages) < 40


def on_a_terminal(**command: Any) -> bytes:
    """What a command writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    return seen


ONE_AFTER_ANOTHER = """
import json, sys
from rankwise.cli import main
for code, *line in json.loads(sys.argv[1]):
    if line[0] == "bench":
        from rankwise.runtime import bench
        bench.peaks_alone = lambda path, loads, *_: [{"host": 10**9}] * len(loads)  # of more processes
    sys.argv = ["rankwise", *line]
    try:
        main()
    except SystemExit as ended:
        assert (ended.code or 0) == code, line
"""


@pytest.mark.parametrize("terminal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bars_on_a_terminal_and_nothing_of_libraries(
    terminal: bool, small_llama: Path, llama: Path, story: Path, tmp_path: Path
) -> None:
    judging = ["--reference", llama, "--text", story, "--samples", 2, "--length", 32, "--cache", tmp_path / "cache", "--json"]
    timing = ["--prompt", 4, "--new-tokens", 2, "--repeats", 1, "--batches", 1]
    commands = [
        [0, *compressing(llama, story, tmp_path / "small"), "--json"],
        [0, "evaluate", small_llama, *judging],
        [0, "bench", small_llama, *timing],
        [0, "densify", small_llama, "-o", tmp_path / "dense"],
        [2, "compress", without_a_weight(llama, tmp_path / "lacking"), "-o", tmp_path / "none"],
    ]
    silenced = "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"
    line: dict[str, Any] = {
        "args": [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands, default=str)],
        "env": {name: value for name, value in os.environ.items() if name not in silenced},
    }
    if terminal:
        seen = on_a_terminal(**line)
    else:
        finished = subprocess.run(**line, capture_output=True, check=True)
        seen = finished.stderr
        report, _ = json.JSONDecoder().raw_decode(finished.stdout.decode())  # nothing is before it
        assert report["kl"] > 0
    assert (b"decomposing: 100%" in seen) == terminal
    assert (b"decomposing ..." in seen) != terminal
    lines = [line.strip() for line in re.split(rb"[\r\n]", seen) if line.strip(b" \x1b[A")]
    ours = rb"^(\x1b\[A)?(about|loading|calibrating|decomposing|ordering|pricing|training|choosing|gradients|measuring"
    ours += rb"|error: .*missing keys|.*(hidden|generat|continu|timing|writing|reading))"
    assert [line for line in lines if not re.search(ours, line)] == []
    assert sum(b"missing" in line.lower() for line in lines) == 1  # transformers would report them too


def without_a_weight(model: Path, folder: Path) -> Path:
    """A copy of a model that lacks one matrix."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_interrupted_comparison_goes_on(
    rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise import stages

    line = ["compare", llama, "--text", story, "--calibration", story, "--samples", 12, "--length", 32, "--judge-samples", 2]
    line += ["--allocations", "uniform,energy", "--rates", "0.3", "-o", tmp_path / "many"]
    allocate = stages.allocate
    asked: list[str] = []

    def interrupted(run: Any, student: Any, metric: str, allocator: Any, budget: Any) -> Any:
        asked.append(type(allocator).__name__)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return allocate(run, student, metric, allocator, budget)

    monkeypatch.setattr(stages, "allocate", interrupted)
    finished = rankwise(*line)
    assert finished.code == 130
    assert finished.err.splitlines()[-1] == "interrupted: the same command goes on from here"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "many" / "run").rglob("*.safetensors")}
    assert kept
    assert rankwise(*line).code == 0
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "many" / "run").rglob("*.safetensors")}.items()
    assert (tmp_path / "many" / RESULTS).exists()
    assert (tmp_path / "many" / "report.html").exists()
