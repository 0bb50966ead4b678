"""Where a run does not fit in memory it goes block by block, or is refused before the work; what fails for want of it is said."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build

from rankwise import RankwiseError, compress, decompose, explore, memory
from rankwise.contest import hold_contest
from rankwise.errors import is_out_of_memory
from rankwise.footprint import shortage
from rankwise.memory import bytes_of, gigabytes, resident, there
from rankwise.recipe import Recipe
from rankwise.testing.folders import content_of

CPU = torch.device("cpu")
DEEP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10}
WINDOWS = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))
Run = Callable[..., Any]


def lines_with(word: str, text: str) -> list[str]:
    """The lines that have the word: libraries write to standard error too."""
    return [line for line in text.splitlines() if word in line]


@pytest.fixture(scope="module")
def deep(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many blocks, with a tokenizer."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    build("llama", **DEEP).save_pretrained(folder)
    for file in llama.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no more than 600 MB beside what this process has: enough for some blocks."""
    monkeypatch.setenv("RANKWISE_MEMORY", gigabytes(resident() + 600 * 10**6))


def test_all_neurons_stay_where_fewer_do_not_fit_in_memory(
    deep: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"calibration": str(story), "samples": 12, "length": 16}
    monkeypatch.setenv("RANKWISE_MEMORY", "1MB")
    few, every = (
        shortage(deep, str(story), Recipe.of(rate=0.2, neurons=n, **asked), ["kronecker"], True) for n in ("fewer", "all")
    )
    assert few is not None
    assert every is not None
    assert few.needed > every.needed
    monkeypatch.setenv("RANKWISE_MEMORY", gigabytes((few.needed + every.needed) / 2 + 2 * 10**7))
    report = compress(deep, 0.2, output=tmp_path / "out", options={"rounds": 1, "value_steps": 0, "points": 0}, **asked).report
    assert report["recipe"]["neurons"] == "all"
    assert report["recipe"]["memory"] is None
    (line,) = lines_with("GB", caplog.text)
    assert "all neurons stay" in line
    with pytest.raises(RankwiseError, match="needs about"):  # its points have fewer
        explore(deep, rates=[0.2], bits=[], output=tmp_path / "explored", **asked)


def test_it_goes_block_by_block_by_itself(
    deep: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, Any] = {"calibration": story, "samples": 12, "length": 16, "allocation": "uniform"}
    monkeypatch.setenv("RANKWISE_MEMORY", "100GB")
    compress(deep, 0.2, output=tmp_path / "whole", **asked)
    assert not lines_with("GB", caplog.text)
    monkeypatch.setenv("RANKWISE_MEMORY", gigabytes(resident() + 600 * 10**6))
    compress(deep, 0.2, output=tmp_path / "streamed", **asked)
    (line,) = lines_with("GB", caplog.text)
    assert re.search(r"needs about \S+ GB in memory, \S+ GB are there: working block by block$", line)
    one, other = (content_of(tmp_path / name) for name in ("whole", "streamed"))
    assert one["model.safetensors"] == other["model.safetensors"]


def test_one_block_at_a_time_is_trained_in_less(deep: Path, story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"calibration": story, "samples": 12, "length": 16, "allocation": "uniform"}
    monkeypatch.setenv("RANKWISE_MEMORY", gigabytes(resident() + 700 * 10**6))
    compress(deep, 0.2, refine="blocks passes=0.1", **asked)
    with pytest.raises(RankwiseError, match="trains the whole model at once"):
        compress(deep, 0.2, refine="blocks, distil", **asked)


def test_the_command_line_refuses_in_one_line(
    rankwise: Run, llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_MEMORY", "1MB")
    few = ["--calibration", story, "--samples", "12", "--length", "16", "--allocation", "uniform", "-o", tmp_path / "out"]
    done = rankwise("compress", llama, *few)
    (said,) = lines_with("GB", done.err)
    assert (done.code, done.out) == (2, "")
    assert re.search(r"error: .* is not enough, .* are needed", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "self"}, "does not write its own text"),
        ({"allocation": "ara", "decomposition": "whitened"}, "'ara' runs the whole model"),
        ({"decomposition": "centred"}, "makes affine factors"),
        ({"rate": None, "target_bytes": "30MB"}, "only a rate can be the target"),
        ({"output": None}, "name an output folder"),
    ],
)
def test_what_does_not_go_block_by_block_is_refused(
    deep: Path, tmp_path: Path, little: None, options: dict[str, Any], message: str
) -> None:
    asked = {"rate": 0.2, "calibration": WINDOWS, "output": tmp_path / "out", "allocation": "uniform"} | options
    with pytest.raises(RankwiseError, match=rf"needs about .* GB in memory, .* are there.*{message}.*--length") as refused:
        compress(deep, **asked)
    assert "without memory" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("work", ["compress", "decompose", "compare", "explore", "a model in memory"])
def test_work_that_needs_the_whole_model_is_refused(work: str, deep: Path, story: Path, tmp_path: Path, little: None) -> None:
    tasks: dict[str, Callable[[], object]] = {
        "compress": lambda: compress(t5, 0.2, calibration=WINDOWS, allocation="uniform", output=tmp_path / "out"),
        "decompose": lambda: decompose(deep, tmp_path / "out", calibration=WINDOWS),
        "compare": lambda: hold_contest(deep, [0.2], [str(story)], tmp_path / "out", calibration=str(story)),
        "explore": lambda: explore(deep, calibration=str(story), output=tmp_path / "out"),
        "a model in memory": lambda: compress(build("llama", **DEEP), 0.2, calibration=WINDOWS, output=tmp_path / "out"),
    }
    t5 = tmp_path / "t5"
    if work == "compress":
        build("t5", d_model=256, d_ff=1024, num_layers=12).save_pretrained(t5)
    with pytest.raises(RankwiseError, match=r"needs about .* GB in memory, .* are there.*block by block"):
        tasks[work]()
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert", vocab_size=2_000_000)  # 384 MB, of which a copy is never made
    monkeypatch.setenv("RANKWISE_MEMORY", gigabytes(resident() + 800 * 10**6))
    assert compress(model, 0.2, calibration=WINDOWS, allocation="uniform").report["kl"] > 0


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="others give back what they like")
def test_what_is_freed_is_given_back() -> None:
    code = """
import torch
from rankwise.memory import give_back, resident
del (large := [torch.ones(2**22)])[:]  # from now on glibc keeps what is smaller
before = resident()
kept = [torch.ones(2**19) for _ in range(200)]  # 2 MiB each
del kept[:-1]  # the last one lies above all others
held = resident()
give_back()
print(held - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    held, left = map(int, done.stdout.split())
    assert held > 3 * 10**8
    assert left < 10**8


def test_the_estimate_is_what_a_run_takes(tmp_path: Path) -> None:
    config = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 500}
    build("llama", **config).save_pretrained(tmp_path / "model")
    code = """
import os, re, torch, rankwise
windows = torch.arange(30 * 64).view(30, 64) % 500
def compress():
    return rankwise.compress("model", calibration=windows, options={"value_steps": 0, "rounds": 0, "points": 0})
os.environ["RANKWISE_MEMORY"] = "1MB"
try:
    compress()
except rankwise.RankwiseError as refused:
    print(float(re.search(r"about ([0-9.]+) GB", str(refused))[1]) * 1e9)
del os.environ["RANKWISE_MEMORY"]
print(compress().report["peak_memory_bytes"]["host"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    said, peak = map(float, done.stdout.split())
    assert 0.5 * said < peak < said


def test_a_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("this system has no control groups")
    monkeypatch.delenv("RANKWISE_MEMORY", raising=False)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    for folder, limit, usage, stat in (
        (tmp_path, "memory.max", "memory.current", "inactive_file 30\n"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 7\ntotal_inactive_file 30\n"),
    ):
        (folder / limit).write_text("max" if limit == "memory.max" else str(2**63 - 4096))
        (folder / usage).write_text("400\n")
        (folder / "memory.stat").write_text(stat)
    free = there(CPU)["host"]
    assert free > 10**8
    for folder, limit in ((tmp_path, "memory.max"), (tmp_path / "memory", "memory.limit_in_bytes")):
        (folder / limit).write_text("1000\n")
    before = resident()
    left = there(CPU)["host"]
    assert before + 630 - 2**22 <= left <= resident() + 630


def test_processes_beside_this_one_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKWISE_MEMORY", raising=False)
    alone = there(CPU)["host"] - resident()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert there(CPU)["host"] - resident() == pytest.approx(alone / 4, rel=0.3)


def test_what_the_machine_is_taken_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_MEMORY", "2GB")
    assert there(CPU) == {"host": 2 * 10**9}
    monkeypatch.setenv("RANKWISE_MEMORY", "much")
    with pytest.raises(RankwiseError, match="RANKWISE_MEMORY='much'"):
        there(CPU)


@pytest.mark.parametrize("kind", ["host", "GPU", "Python"])
def test_out_of_memory_ends_in_one_line(
    kind: str, rankwise: Run, llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_too_much(*_: Any) -> Any:
        if kind == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nmore of it")
        if kind == "Python":
            raise MemoryError
        return torch.empty(2**55)

    monkeypatch.setattr("rankwise.stages.collect", takes_too_much)
    finished = rankwise("compress", llama, "--calibration", story, "--samples", 12, "--length", 16, "-o", tmp_path / "out")
    assert (finished.code, finished.out) == (2, "")
    assert "Traceback" not in finished.err
    (line,) = lines_with("error: ", finished.err)
    assert all(wanted in line for wanted in ("memory", "--length", "--memory", "--resume"))


def test_other_errors_are_not_taken_for_it(rankwise: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr("rankwise.starting.start", fails)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        rankwise("compress", llama, "-o", tmp_path / "out")


def test_idle_gpus_are_told_of(llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: dict[str, Any] = {"calibration": WINDOWS, "allocation": "uniform"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    compress(llama, 0.2, **asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    compress(llama, 0.2, device="cpu", **asked)
    assert not lines_with("torchrun", caplog.text)
    compress(llama, 0.2, **asked)
    (line,) = lines_with("torchrun", caplog.text)
    assert "one of 4 GPUs is used: torchrun --nproc-per-node 4 -m rankwise" in line


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("1000", 1000), ("20mb", 2 * 10**7)])
def test_bytes(text: str, count: int) -> None:
    assert bytes_of(text) == count
