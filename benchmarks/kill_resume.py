"""Kill a run at random moments, resume it, and compare the result with an undisturbed run's, byte for byte.

    python benchmarks/kill_resume.py [--kills 60] [--seed 0]

The moments are spread evenly over the measured length of a run, from its first line of Python to its last; one kill in three is a
SIGINT, the others are SIGKILL, and every third run is killed once more when it is resumed. The model is tiny, so that the minutes
go into kills; a run is a fork of this process, so that none falls into the import of torch. As root on Linux, a disk that is
full is tried too: a tmpfs of growing size. Writes benchmarks/results/kill_resume.md; exit code 1 if any result differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import rankwise.pipeline  # noqa: F401  once, for all forks
from rankwise.cli import main as command_line
from rankwise.testing.allocators import VOCABULARY, tiny_model
from rankwise.testing.folders import MEASURED, content_of

RESULTS = Path(__file__).parent / "results" / "kill_resume.md"
DONE = "done"
OPTIONS = ["--rate", "0.3", "--samples", "60", "--length", "16", "--option", "rounds=2", "--option", "value_steps=60"]


def log_of(folder: Path) -> Path:
    """What the runs in a folder said; beside it, where the disk is never full."""
    return folder.with_suffix(".log")


def start(folder: Path, *more: str) -> int:
    """The process id of a run in `folder`, quiet but for its errors in the file `log`."""
    child = os.fork()
    if child:
        return child
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with the forks before, one of which was killed holding it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        os.chdir(folder)
        log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["rankwise", "compress", "../model", "--output", "out", *OPTIONS, *more]
        command_line()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def finish(folder: Path, *more: str) -> int:
    """The exit code of a run left alone."""
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, *more), 0)[1])


def killed_after(folder: Path, seconds: float, number: signal.Signals, *more: str) -> bool:
    """Kill a run after so many seconds; whether it was still going."""
    child = start(folder, *more)
    time.sleep(seconds)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def stage_of(folder: Path) -> str:
    """How far a killed run had come."""
    run = folder / "out.run"
    if (folder / "out").exists():
        return "after the result, before the run folder was gone" if run.exists() else DONE
    for stage in ("finished", "allocation", "measured", "decomposition", "statistics", "text", "lock"):
        if list(run.glob(f"{stage}*")):
            return {"finished": "writing the result", "lock": "first stage"}.get(stage, f"after a result of {stage}")
    return "before anything was kept"


def kills(work: Path, number: int, seed: int, expected: dict[str, bytes], length: float) -> tuple[int, Counter[str]]:
    """How many results differ, and where the kills fell. A run that was over before its moment came is made again."""
    rng, different, where = random.Random(seed), 0, Counter[str]()
    for i in range(number):
        folder = work / f"killed-{i}"
        folder.mkdir()
        how = signal.SIGINT if i % 3 == 2 else signal.SIGKILL
        moment = (i + rng.random()) / number * length
        while not killed_after(folder, moment, how) or stage_of(folder) == DONE:
            shutil.rmtree(folder / "out")
            moment *= 0.95
        where[stage_of(folder)] += 1
        if i % 3 == 1 and killed_after(folder, rng.random() * length / 2, signal.SIGKILL, "--resume"):
            where[f"{stage_of(folder)} (a second kill)"] += 1
        code = 0 if stage_of(folder) == DONE else finish(folder, "--resume")
        left = sorted(p.name for p in folder.iterdir())
        if code != 0 or left != ["out"] or content_of(folder / "out") != expected:
            print(f"{folder}: exit code {code}, {left}, {log_of(folder).read_text()[-500:]}")
            different += 1
        else:
            shutil.rmtree(folder)
        print(f"\r{i + 1} of {number} runs killed, {different} results differ", end="", flush=True)
    print()
    return different, where


def full_disks(work: Path, expected: dict[str, bytes]) -> tuple[int, int]:
    """How many disks filled up, and how many results differ after they were enlarged."""
    full = different = 0
    for kilobytes in (16, 64, 128, 192, 256, 320, 384):
        folder = work / f"disk-{kilobytes}"
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=False)
        if mounted.returncode:
            return 0, 0
        try:
            code = finish(folder)
            log = log_of(folder).read_text()
            full += code == 2
            clear = code == 0 or (code == 2 and "No space left on device" in log and "Traceback" not in log)
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            if not clear or (code and finish(folder, "--resume") != 0) or content_of(folder / "out") != expected:
                print(f"{folder}: exit code {code}, {log[-500:]}")
                different += 1
        finally:
            subprocess.run(["umount", folder], check=True)
    return full, different


def make_model(folder: Path) -> None:
    model: PreTrainedModel = tiny_model(layers=2)
    model.save_pretrained(folder)
    assert model.config.vocab_size == VOCABULARY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own must not be forked
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model")
        peace = work / "peace"
        peace.mkdir()
        assert finish(peace) == 0, log_of(peace).read_text()
        expected = content_of(peace / "out")
        since = time.perf_counter()
        assert finish(peace, "--overwrite") == 0
        length = time.perf_counter() - since
        different, where = kills(work, args.kills, args.seed, expected, length)
        full, wrong = full_disks(work, expected) if os.name == "posix" and os.getuid() == 0 else (0, 0)
    rows = "\n".join(f"| {place} | {count} |" for place, count in where.most_common())
    text = f"""# Killed and resumed

`python benchmarks/kill_resume.py --kills {args.kills} --seed {args.seed}`: {args.kills} runs of {length:.1f} s killed at moments
spread over their whole length ({sum(where.values())} kills in all), then resumed: **{different} of {args.kills} results differ**
from the undisturbed one in any byte of any file (of report.json the fields {", ".join(MEASURED)} are left out: they say what the
work took). Disks that filled up: {full}, each with one line and exit code 2; {wrong} results differ after they were enlarged.

| a kill fell | times |
|---|---|
{rows}
"""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)
    sys.exit(different + wrong > 0)


if __name__ == "__main__":
    main()
