"""Damage to what a run has kept, a full disk, and death in its last moment: the result is the same, to the last bit."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rankwise.run_folder import FINISHED, RunFolder
from rankwise.testing.folders import content_of

OPTIONS = ("--rate", 0.3, "--samples", 40, "--length", 16, "--option", "rounds=1", "--option", "value_steps=3", "-o", "out")
Run = Callable[..., Any]

# one file of each kind that a run keeps, and what else must be gone for it to be read
KINDS = {
    "text": (),
    "statistics": (),
    "decomposition": (),
    "measured/fisher": ("allocation",),
    "measured/divergence": ("allocation",),
    "measured/gradients": ("allocation",),
    "allocation": (),
}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda b: b[: len(b) // 2],
    "a bit flipped": lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
}


class Kept(NamedTuple):
    """A finished run that did not remove its folder."""

    result: dict[str, bytes]
    run: Path


@pytest.fixture(scope="module")
def kept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    from rankwise import compress

    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "remove", lambda self: None)
        options = {"rounds": "1", "value_steps": "3"}  # as the command line gives them
        compress(llama, 0.3, samples=40, length=16, options=options, output=folder / "out")
    return Kept(content_of(folder / "out"), folder / "out.run")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_made_good(
    kind: str, damage: Callable[[bytes], bytes], kept: Kept, here: Path, llama: Path, rankwise: Run, caplog: Any
) -> None:
    shutil.copytree(kept.run, "out.run")
    (here / "out.run" / FINISHED).unlink()
    for other in KINDS[kind]:
        [path] = here.glob(f"out.run/{other}*.safetensors")
        path.unlink()
    file = next(p for p in sorted(here.rglob("*.safetensors")) if str(p).startswith(f"{here}/out.run/{kind}"))
    file.write_bytes(damage(file.read_bytes()))
    assert rankwise("compress", llama, *OPTIONS, "--resume").code == 0
    assert [r.message for r in caplog.records if "damaged" in r.message] == [f"{file} is damaged: it is computed again"]
    assert content_of(here / "out") == kept.result
    assert not (here / "out.run").exists()


def test_death_between_the_result_and_the_end(
    kept: Kept, here: Path, llama: Path, rankwise: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: RunFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove", die)
        assert rankwise("compress", llama, *OPTIONS).code == 130
    assert content_of(here / "out") == kept.result
    assert (here / "out.run").exists()
    assert "--resume" in rankwise("compress", llama, *OPTIONS).err
    assert rankwise("compress", llama, *OPTIONS, "--resume").code == 0
    assert content_of(here / "out") == kept.result
    assert not (here / "out.run").exists()


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", ["text", "statistics", "decomposition", "result"])
def test_a_full_disk(part: str, kept: Kept, here: Path, llama: Path, rankwise: Run, disk: Callable[[int], None]) -> None:
    if part != "text":
        shutil.copytree(kept.run, "out.run")
        if part != "result":
            for path in here.glob(f"out.run/{part}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    disk(2000 if part == "text" else 20_000)
    finished = rankwise("compress", llama, *OPTIONS, *(["--resume"] if part != "text" else []))
    disk(resource.RLIM_INFINITY)
    assert (finished.code, finished.out) == (2, "")
    [line] = finished.err.splitlines()
    assert re.search(f"^error: .*cannot write {here}/out.*File too large", line)
    assert not (here / "out").exists()
    assert not list(here.rglob("*.part"))
    assert rankwise("compress", llama, *OPTIONS, "--resume").code == 0
    assert content_of(here / "out") == kept.result
