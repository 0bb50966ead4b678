"""One thread and no network for every test, set before torch and transformers are imported; small models; the shared data."""

from __future__ import annotations

import functools
import os
import random
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "COLUMNS": "200"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

settings.register_profile("thorough", max_examples=300)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'\n"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of evaluations go here, not to the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["RANKWISE_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def quick() -> None:
    """One thread; no wait for the disk, which takes longer than a tiny result: no test pulls the plug; and few words where
    models go on from a prompt, one after another."""
    import torch

    from rankwise.evaluation import generation

    torch.set_num_threads(1)
    os.fsync = lambda _: None
    generation.PROMPTS, generation.NEW_TOKENS = 3, 12


PAGE: dict[str, Any] = {"page_of": lambda _: "", "costs_of_each": lambda *_: ({}, 0), "sample_texts": lambda *_: []}


@functools.cache
def page() -> dict[str, Any]:
    """What draws a page, and what is computed for it alone."""
    from rankwise import pipeline

    return {name: getattr(pipeline, name) for name in PAGE}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The page of a tiny result takes longer than all the rest of it: only tests marked `page`, and the fixtures that
    they are the first to ask for, have it made."""
    from rankwise import pipeline, refining

    made = page() | PAGE if item.get_closest_marker("page") is None else page()
    vars(pipeline).update(made)
    vars(refining).update(sample_texts=made["sample_texts"])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


class Finished(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def rankwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command line, in this process: saves the seconds of importing torch."""

    def run(*arguments: object) -> Finished:
        from rankwise.cli import main

        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Finished(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` says that every peak is a gigabyte: each is of a process, which takes seconds to start."""
    everywhere = [{"host": 10**9}]
    monkeypatch.setattr("rankwise.runtime.bench.peaks_alone", lambda path, loads, *_: everywhere * len(loads))


@pytest.fixture
def fresh_compiler() -> None:
    """`torch.compile` forgets what earlier tests of this process compiled: after eight models of a kind it refuses one more."""
    import torch

    torch.compiler.reset()


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    words = ["Once", "upon", "a", "time", "there", "was", "low", "rank", "matrix", "who", "met", "its", "budget.", "The", "end!"]
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(" ".join(random.Random(0).choices(words, k=1500)))
    return file


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with a tokenizer of characters."""
    from architectures import VOCABULARY, build
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    names = ["<unk>", "<s>", "</s>", *CHARACTERS]
    assert len(names) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_llama(llama: Path, story: Path) -> Path:
    """The same, compressed by a quarter."""
    from rankwise import compress

    folder = llama.with_name("small-llama")
    compress(llama, 0.25, calibration=story, output=folder, allocation="uniform", samples=10, length=32)
    return folder


@pytest.fixture(scope="session")
def explored(llama: Path, story: Path) -> Path:
    """What `rankwise explore` finds of it, with its page."""
    from rankwise import explore, report

    folder = llama.with_name("explored-llama")
    explore(llama, calibration=str(story), rates=[0.2, 0.4], bits=[4, 2.5], samples=12, length=32, output=folder)
    report([folder], folder / "report.html")
    return folder


@pytest.fixture(scope="session")
def small_bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, compressed by a quarter: really trained, every kind of matrix low-rank."""
    from rankwise import compress

    folder = tmp_path_factory.mktemp("bundled") / "small"
    compress(None, 0.25, output=folder, allocation="uniform", samples=16, length=64)
    return folder
