"""A run that is killed, again and again, and resumed ends with the very bytes of one that was left in peace."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, forked
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rankwise.testing.allocators import VOCABULARY, tiny_model

KILLS = ((1, 5), (6, 14), (15, 15))  # when so many results are kept: a random number between, and a random moment after it
SECONDS = 0.2  # of that moment, at most; a whole allocation is longer
COMPRESS = ["compress", "model", "--calibration", "text.txt"]
OPTIONS = ["--rate", "0.3", "--samples", "40", "--length", "16", "--option", "rounds=1", "--option", "value_steps=100"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `model`, its tokenizer, a `text` of random words, and `peace`: an uninterrupted run's result."""
    folder = tmp_path_factory.mktemp("resume")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder / "model")
    tiny_model(layers=2).save_pretrained(folder / "model")
    numbers = torch.randint(VOCABULARY, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in numbers))
    start(folder, "peace").process.join()
    return folder


def start(folder: Path, output: str, *more: str) -> Fork:
    return forked(folder, *COMPRESS, "--output", output, *OPTIONS, *more)


@pytest.fixture
def finish_here(made: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A run in this process, which has the libraries loaded."""
    monkeypatch.chdir(made)

    def run(output: str, *more: str) -> None:
        finished = rankwise(*COMPRESS, "--output", output, *OPTIONS, *more)
        assert finished.code == 0, finished.err

    return run


def kept(run: Path) -> dict[Path, int]:
    """The whole results in a run folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def kill(fork: Fork, run: Path, results: int, seconds: float) -> None:
    """Kill the process some time after it has kept so many results."""
    while len(kept(run)) < results:
        assert fork.process.is_alive(), "it ended before it could be killed"
        time.sleep(0.005)
    time.sleep(seconds)
    fork.process.kill()
    fork.process.join()
    assert fork.process.exitcode == -signal.SIGKILL


def written(output: Path) -> dict[str, bytes]:
    """What must be the same: the ranks and the weights."""
    files = [output / "ranks.json", *output.glob("*.safetensors")]
    assert len(files) > 1
    return {file.name: file.read_bytes() for file in files}


def test_killed_and_resumed_is_the_same_as_left_in_peace(made: Path, finish_here: Callable[..., None]) -> None:
    rng, run, before = random.Random(0), made / "killed.run", dict[Path, int]()
    for low, high in KILLS:
        fork = start(made, "killed", *(["--resume"] if before else []))
        kill(fork, run, rng.randint(low, high), rng.uniform(0, SECONDS if low == high else 0.01))
        after = kept(run)
        assert before.items() <= after.items()  # nothing was computed twice
        assert not (made / "killed").exists()
        before = after
    finish_here("killed", "--resume")
    assert written(made / "killed") == written(made / "peace")
    assert not run.exists()


def test_the_same_seed_gives_the_same_bytes_twice(made: Path, finish_here: Callable[..., None]) -> None:
    finish_here("again")
    assert written(made / "again") == written(made / "peace")


def test_another_seed_draws_another_text(made: Path, finish_here: Callable[..., None]) -> None:
    finish_here("other", "--seed", "1")
    assert written(made / "other") != written(made / "peace")
