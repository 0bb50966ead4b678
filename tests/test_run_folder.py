"""The run folder: computed once, never believed when damaged, never half written; and what its keys tell apart."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise import RankwiseError, run_folder
from rankwise.run_folder import RunFolder, digest, fingerprint
from rankwise.testing.allocators import tiny_model

STAGE, KEY = "decomposition/svd/model.layers.0.q", "k1"


class Counted:
    """A computation that says how often it was run; its first tensor is not contiguous."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.runs = value, 0

    def __call__(self) -> dict[str, Tensor]:
        self.runs += 1
        return {"a/b.c": torch.full((2, 3), self.value).T, "bytes": torch.arange(3, dtype=torch.uint8), "one": torch.tensor(7)}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def files(folder: RunFolder) -> list[Path]:
    assert folder.path is not None
    return [p for p in folder.path.rglob("*") if p.is_file() and p.name != run_folder.LOCK]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_computed_once(folder: RunFolder) -> None:
    compute = Counted()
    first = folder.cached(STAGE, KEY, compute)
    second = folder.cached(STAGE, KEY, compute)
    assert compute.runs == 1
    assert same(first, compute())
    assert same(first, second)
    assert [n for n in first if first[n].stride() != second[n].stride()] == []  # so that both are multiplied alike


def test_another_key_or_stage_is_another_result(folder: RunFolder) -> None:
    results = [folder.cached(s, k, Counted(v)) for v, (s, k) in enumerate([(STAGE, KEY), (STAGE, "k2"), ("statistics", KEY)])]
    assert [result["a/b.c"][0, 0].item() for result in results] == [0, 1, 2]
    assert len(files(folder)) == 3


def test_with_no_path_nothing_is_kept() -> None:
    compute = Counted()
    first, second = (RunFolder().cached(STAGE, KEY, compute) for _ in range(2))
    assert same(first, second)
    assert compute.runs == 2
    assert all(tensor.is_contiguous() for tensor in first.values())  # as with a path


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "a few bytes": lambda b: b[:5],
    "half the header": lambda b: b[:40],
    "all but the last byte": lambda b: b[:-1],
    "garbage": lambda b: b"garbage" * 100,
    "zeros": lambda b: bytes(len(b)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_computed_again(folder: RunFolder, damage: Callable[[bytes], bytes]) -> None:
    compute = Counted()
    expected = folder.cached(STAGE, KEY, compute)
    [file] = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    assert same(folder.cached(STAGE, KEY, compute), expected)
    assert compute.runs == 2
    assert same(folder.cached(STAGE, KEY, compute), expected)
    assert compute.runs == 2


def test_a_full_disk_leaves_nothing_behind(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", save_file)
    with pytest.raises(RankwiseError, match="No space left on device"):
        folder.cached(STAGE, KEY, Counted())
    assert files(folder) == []
    monkeypatch.undo()
    compute = Counted()
    folder.cached(STAGE, KEY, compute)
    assert compute.runs == 1


def test_every_flipped_byte_is_seen(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever byte of a file changes, in its header or in its values: it is named and computed again."""
    compute = Counted()
    expected = folder.cached(STAGE, KEY, compute)
    [file] = files(folder)
    whole = file.read_bytes()
    for at in range(len(whole)):
        caplog.clear()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        assert same(folder.cached(STAGE, KEY, compute), expected)
        assert compute.runs == at + 2
        assert [r.message for r in caplog.records] == [f"{file} is damaged: it is computed again"]


HOLDER = """
import sys, time, torch
from pathlib import Path
from rankwise.run_folder import RunFolder
RunFolder(Path(sys.argv[1])).cached("stage", "key", lambda: {"a": torch.ones(1)})
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_kept_out_until_it_dies(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for act in (lambda: folder.cached(STAGE, KEY, Counted()), folder.hold):
            with pytest.raises(RankwiseError, match="another run is at work in"):
                act()
        assert [file.parent for file in files(folder)] == [folder.path]  # the other's alone
        other.kill()
        other.wait()
    folder.cached(STAGE, KEY, Counted())
    folder.remove()
    folder.hold()


def test_a_file_system_that_locks_nothing_and_flushes_no_folder(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl, fsync = pytest.importorskip("fcntl"), os.fsync

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def no_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", no_folders)
    compute = Counted()
    for _ in range(2):
        folder.cached(STAGE, KEY, compute)
    assert compute.runs == 1
    assert ["no locks" in record.message for record in caplog.records] == [True]
    folder.remove()

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RankwiseError, match="Input/output error"):
        folder.hold()
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RankwiseError, match="Input/output error"):
        folder.cached(STAGE, KEY, compute)


@pytest.mark.parametrize("home", ["/dev/null", ""])
def test_a_cache_that_cannot_be_written_is_done_without(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("RANKWISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    if not home:
        monkeypatch.setattr(Path, "home", lambda: Path("~no one").expanduser())  # as where there is no home
    assert not RunFolder.cache(None).keeps
    assert not RunFolder.cache(Path(__file__) / "cache").keeps
    assert ["results are not kept" in record.message for record in caplog.records] == [True, True]
    assert RunFolder.cache(tmp_path / "new").keeps
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failing_computation_leaves_nothing_behind(folder: RunFolder) -> None:
    def fail() -> dict[str, Tensor]:
        raise KeyError

    with pytest.raises(KeyError):
        folder.cached(STAGE, KEY, fail)
    assert folder.path is not None
    assert not folder.path.exists()


def test_an_earlier_run_is_neither_mixed_in_nor_lost(tmp_path: Path) -> None:
    output, earlier = tmp_path / "out", tmp_path / "out.run"
    assert RunFolder.beside(output, resume=False, overwrite=False).path == earlier
    earlier.mkdir()
    with pytest.raises(RankwiseError, match="--resume"):
        RunFolder.beside(output, resume=False, overwrite=False)
    for overwrite in (False, True):
        assert RunFolder.beside(output, resume=True, overwrite=overwrite).path == earlier
        assert earlier.exists()
    assert RunFolder.beside(output, resume=False, overwrite=True).path == earlier


ZEROS = torch.zeros(4, 6, dtype=torch.int32)
DIFFERENT: list[tuple[Any, ...]] = [
    (),
    ("",),
    ("a", "b"),
    ("ab",),
    ("b", "a"),
    (1,),
    (1.0,),
    ("1",),
    (None,),
    (ZEROS,),
    (ZEROS.view(6, 4),),  # the same bytes as other windows
    (ZEROS.float(),),
    (ZEROS[:2], ZEROS[2:]),
    (torch.ones(4, 6, dtype=torch.int32),),
]


def test_digests_tell_apart_what_differs_and_nothing_else() -> None:
    digests = [digest(*parts) for parts in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    assert digests == [digest(*parts) for parts in DIFFERENT]
    assert digest("rankwise", 0.2, torch.arange(3)) == digest("rankwise", 0.2, torch.arange(6)[:3])
    assert digest(torch.eye(3)[:, 1:]) == digest(torch.eye(3)[:, 1:].contiguous())
    assert digest("rankwise") == "fb48fd58f691a4e7f03c"  # from one process, and one machine, to the next


def test_a_fingerprint_sees_every_parameter() -> None:
    model = tiny_model()
    before = fingerprint(model)
    assert fingerprint(model) == before
    for parameter in model.parameters():
        value = parameter.flatten()[-1].item()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
            assert fingerprint(model) != before
            parameter.view(-1)[-1] = value
    assert fingerprint(model) == before
