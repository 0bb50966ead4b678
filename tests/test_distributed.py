"""Several processes on one run: the ranks of one process, measurements within rounding, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, forked, launched
from safetensors.torch import load_file

from rankwise import RankwiseError, distributed
from rankwise.testing.folders import content_of

METHOD = "llrc points=0 rounds=1 value_steps=3"  # a measured KL of this random model is little more than rounding
OPTIONS = ["--rate", "0.3", "--samples", "800", "--length", "32", "--allocation", METHOD, "--neurons", "all"]
COMPRESS = ["compress", "llama", "--calibration", "story.txt"]


def start(folder: Path, output: str, processes: int, *more: str) -> Fork:
    command = [*COMPRESS, "-o", output, *OPTIONS, *more]
    return launched(processes, folder, *command) if processes > 1 else forked(folder, *command)


def finished(folder: Path, output: str, processes: int, *more: str) -> str:
    """What the processes write to standard output, which end well."""
    fork = start(folder, output, processes, *more)
    out, err = fork.communicate()
    assert fork.process.exitcode == 0, err
    return out


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "one", "WORLD_SIZE": "two"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_launchers_variables(variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.size()) == expected


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"RANK": "1"}, {"RANK": "0", "MASTER_ADDR": ""}])
def test_nobody_waits_for_ever(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TO_JOIN", timedelta(seconds=1))
    waits = f"process {variables['RANK']} of 2 waits for the others at .*:{port}; not under torchrun\\? unset WORLD_SIZE"
    with pytest.raises(RankwiseError, match=waits):
        distributed.wait()
    assert [re.fullmatch(waits, record.message) is not None for record in caplog.records] == [True]


@pytest.fixture(scope="module")
def folder(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a text of several batches, and `alone`: what one process made."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "llama").symlink_to(llama)
    (folder / "story.txt").write_text(story.read_text() * 8)
    finished(folder, "alone", 1)
    return folder


@pytest.mark.parametrize(("processes", "more"), [(3, []), (2, ["--memory", "8GB"])], ids=["3", "2, streamed"])
def test_as_one_process(processes: int, more: list[str], folder: Path) -> None:
    output = f"by-{processes}"
    assert finished(folder, output, processes, *more).count("written to") == 1
    same_as_alone(folder, output)


@pytest.mark.slow  # a minute to load the libraries so often
def test_as_a_user_starts_them(folder: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rankwise", *COMPRESS]
    done = subprocess.run(
        [sys.executable, *command, "-o", "started", *OPTIONS], cwd=folder, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("written to") == 1
    same_as_alone(folder, "started")


def same_as_alone(folder: Path, output: str) -> None:
    one, several = (content_of(folder / name) for name in ("alone", output))
    assert one.keys() == several.keys()
    assert one["ranks.json"] == several["ranks.json"]
    reports = [json.loads(content["report.json"]) for content in (one, several)]
    assert reports[0]["kl"] == pytest.approx(reports[1]["kl"], rel=1e-3)
    efforts = [json.loads((folder / name / "report.json").read_text())["effort"] for name in ("alone", output)]
    assert efforts[0]["backward_tokens"] == efforts[1]["backward_tokens"]
    tensors = [load_file(folder / name / "model.safetensors") for name in ("alone", output)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_refined_block_by_block_by_two(folder: Path) -> None:
    asked = ["--refine", "blocks passes=2 tokens=256", "--allocation", "uniform", "--samples", "200", "--memory", "8GB"]
    assert finished(folder, "refined", 2, *asked).count("written to") == 1
    before, after = (record["kl"] for record in json.loads((folder / "refined" / "report.json").read_text())["history"][-2:])
    assert after < before


def test_mlps_are_narrowed_by_two_as_by_one(folder: Path) -> None:
    asked = ["--allocation", "uniform", "--samples", "200", "--neurons", "fewer", "--rate", "0.5"]
    for processes, more in ((1, []), (2, ["--memory", "8GB"])):
        finished(folder, f"narrow-{processes}", processes, *asked, *more)
    configs = [json.loads((folder / f"narrow-{n}" / "config.json").read_text())["quantization_config"] for n in (1, 2)]
    assert configs[0] == configs[1]
    assert configs[0]["sizes"]
    one, two = (load_file(folder / f"narrow-{n}" / "model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_wrong_is_said_once(folder: Path) -> None:
    fork = start(folder, "wrong", 2, "--allocation", "nonsense")
    out, err = fork.communicate()
    assert (fork.process.exitcode, out) == (1, "")  # torchrun's own
    assert "error: unknown allocation 'nonsense'" in err
    assert "error in process" not in err
    assert not list(folder.glob("wrong*"))


@pytest.mark.parametrize(
    "more", [pytest.param([], id="in memory", marks=pytest.mark.slow), pytest.param(["--memory", "8GB"], id="streamed")]
)
def test_a_dead_process_ends_the_run_which_resumes(
    more: list[str], folder: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = start(folder, "dead", 2, *more)
    run = folder / "dead.run"
    while not list(run.glob("measured/*")):
        assert fork.process.is_alive()
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(fork.process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, err = fork.communicate()
    assert fork.process.exitcode == 1
    assert out == ""
    assert not (folder / "dead").exists()
    assert "Signal 9 (SIGKILL)" in err or "lost the others" in err  # whichever torchrun hears of first
    monkeypatch.chdir(folder)
    resumed = rankwise(*COMPRESS, "-o", "dead", *OPTIONS, *more, "--resume")
    assert resumed.code == 0, resumed.err
    assert (folder / "dead" / "ranks.json").read_bytes() == (folder / "alone" / "ranks.json").read_bytes()
    assert not run.exists()
    shutil.rmtree(folder / "dead")
