"""Malformed input of every kind ends in one clear line and exit code 2: nothing runs, hangs, or is left half written."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import COMPRESS, DENSIFY, EVALUATE, INSPECT, Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

SECONDS = 300


@pytest.fixture
def root(llama: Path, small_llama: Path, story: Path, tmp_path: Path) -> Path:
    """A folder in which every case would succeed, were it not spoilt."""
    shutil.copytree(llama, tmp_path / "llama")
    shutil.copytree(small_llama, tmp_path / "small")
    shutil.copy(story, tmp_path / "story.txt")
    return tmp_path


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What takes longer than this never ends."""

    def fail(*_: Any) -> None:
        pytest.fail(f"still going after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def found(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def assert_refused(finished: Any) -> None:
    assert (finished.code, finished.out) == (2, ""), finished
    assert finished.err.startswith("error: ")
    assert len(finished.err.splitlines()) == 1, finished.err


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def right(small_llama: Path) -> torch.Tensor:
    return logits(small_llama)


def hangs_transformers(case: Case) -> bool:
    """What our own commands refuse, but `from_pretrained` alone would wait for or build for ever."""
    return case.name.endswith(("a pipe", "an endless device")) or "num_hidden_layers" in case.name


@pytest.mark.parametrize(
    "case", [c for c in cases() if c.line == DENSIFY and not hangs_transformers(c)], ids=lambda case: case.name
)
def test_from_pretrained_is_never_wrong_in_silence(
    case: Case, right: torch.Tensor, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with a compressed folder, plain transformers raises, or loads the very model that was saved."""
    case.spoil(root)
    monkeypatch.chdir(root)
    try:
        loaded = logits(root / "small")
    except Exception:
        loaded = right  # in whose way, transformers decides
    assert torch.equal(loaded, right) or not loaded.isfinite().all()  # values that are not finite show themselves
    assert not (root / "executed").exists()


CASES = cases()
READ_BEFORE = ("text", "tokenizer", "llama/tokenizer", "generation_config", "llama/config.json")  # in either way of working
STREAMED = [
    replace(case, name=f"{case.name}, streamed", line=f"{case.line} --memory 8GB")
    for case in CASES
    if case.line == COMPRESS and not case.name.startswith(READ_BEFORE)
]


def as_in_memory(case: Case) -> Any:
    """A case that one block at a time reads with the same words as the whole: by default one of the two is enough."""
    return pytest.param(case, marks=pytest.mark.slow, id=case.name) if case.name.startswith("config ") else case


@pytest.mark.parametrize("case", [*CASES, *map(as_in_memory, STREAMED)], ids=lambda case: case.name)
def test_one_line_and_nothing_else(case: Case, root: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case.spoil(root)
    before = found(root)
    monkeypatch.chdir(root)
    finished = rankwise(*shlex.split(case.line))
    assert found(root) == before
    assert_refused(finished)


FILES = {  # what is fuzzed, and a command that reads it
    "llama/config.json": COMPRESS,
    "llama/generation_config.json": COMPRESS,
    "llama/tokenizer.json": COMPRESS,
    "llama/tokenizer_config.json": COMPRESS,
    "llama/model.safetensors": COMPRESS,
    "small/config.json": DENSIFY,
    "small/model.safetensors": DENSIFY,
    "small/ranks.json": INSPECT,
    "small/recipe.yaml": EVALUATE,
}
HEADER = 4000  # bytes of a safetensors file in which most of its header lies
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
FUZZ = settings(
    max_examples=settings().max_examples // 12,  # each is a command that runs: 8 by default, 25 in the profile "thorough"
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value in a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def put_right_or_refused(rankwise: Callable[..., Any], root: Path, file: str, content: bytes) -> None:
    """With `content` in place of a file's own, the command does its work or refuses it in one line."""
    own = (root / file).read_bytes()
    before = found(root)
    try:
        (root / file).write_bytes(content)
        finished = rankwise(*shlex.split(FILES[file]))
        if finished.code == 0:
            shutil.rmtree(root / "out", ignore_errors=True)
        else:
            assert_refused(finished._replace(out=""))  # the tokenizers library prints what it ignores
        assert found(root) == before
    finally:
        (root / file).write_bytes(own)


@pytest.mark.parametrize("file", FILES)
def test_any_bytes(file: str, root: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    own = (root / file).read_bytes()
    at = st.integers(0, min(len(own), HEADER))

    @FUZZ
    @given(start=at, length=st.integers(0, 20), patch=st.binary(max_size=8))
    def check(start: int, length: int, patch: bytes) -> None:
        put_right_or_refused(rankwise, root, file, own[:start] + patch + own[start + length :])

    check()


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("json")])
def test_any_values(file: str, root: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    own = (root / file).read_text()

    @FUZZ
    @given(place=st.integers(0, 10_000), value=JSON)
    def check(place: int, value: Any) -> None:
        tree = json.loads(own)
        spots = list(places(tree))
        container, key = spots[place % len(spots)]
        container[key] = value
        put_right_or_refused(rankwise, root, file, json.dumps(tree).encode())

    check()
