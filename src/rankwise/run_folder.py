"""Where a run keeps what it has computed, so that it can be killed and resumed.

Every result is a safetensors file named after its stage and the digest of all it was computed from: a changed option leaves
the results that do not depend on it in use. It holds a digest of its own content too: what a crash or a disk has damaged is
computed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from rankwise import distributed
from rankwise.errors import RankwiseError, reason

logger = logging.getLogger(__name__)
CHECKPOINT_EVERY = 60.0  # seconds
LOCK, FINISHED = "lock", "finished"
NOTES = "__notes__"  # plain values, beside tensors that are named after matrices
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # by a file system
_locks: dict[Path, IO[str]] = {}  # run folders that this process holds; the system lets go of them when it ends, however it ends


def digest(*parts: Any) -> str:
    """A short digest of values with a stable text form, and of tensors by their dtype, shape and bytes."""
    state = hashlib.sha256()  # three times as fast as others where the processor knows it
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype} {tuple(part.shape)}".encode())
            state.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()[:20]


def user_cache() -> Path:
    """The folder for results that belong to no run: $RANKWISE_CACHE, else rankwise in the user's cache folder."""
    own = os.environ.get("RANKWISE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"


def fingerprint(model: nn.Module) -> str:
    """The digest of a model: its config and the name, shape and bytes of every parameter and buffer: whole numbers are these."""
    parts: list[Any] = [str(getattr(model, "config", ""))]
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        parts += [name, tuple(tensor.shape), tensor]
    return digest(*parts)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _digest_of(tensors: dict[str, Tensor]) -> str:
    return digest(*(part for item in sorted(tensors.items()) for part in item))


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `file` and put it in its place: after a crash, of the machine too, it is the old or the
    new one. Raises `RankwiseError` where it cannot be written."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        set_rights(temporary)
        flush(temporary)
        os.replace(temporary, file)
        flush(file.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RankwiseError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from None


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def set_rights(file: Path) -> None:
    """Give a file the rights of any new one: safetensors leaves its own to their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    with contextlib.suppress(OSError):  # some file systems have no rights
        file.chmod(0o666 & ~mask)


def _lock(file: IO[str]) -> None:
    """Keep others out of an open file. Where the file system has no locks, a line says so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks, so start no second run on it", file.name)


@dataclass(frozen=True)
class RunFolder:
    """Results on disk; with no path, nothing is kept.

    shared: several processes may use it at once, which at worst compute the same twice.
    known: another, finished run folder; its results are used, and it is never written to.
    """

    path: Path | None = None
    shared: bool = False
    known: Path | None = None

    @classmethod
    def cache(cls, path: Path | None) -> RunFolder:
        """Results that belong to no run, in `path`, by default `user_cache()`. Where it cannot be written, a line
        says so, and nothing is kept."""
        try:
            path = path or user_cache()
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except (OSError, RuntimeError) as error:  # the latter where there is no home
            logger.warning("results are not kept, the cache cannot be written: %s", error)
            return cls()
        return cls(path, shared=True)

    @classmethod
    def beside(cls, output: Path, resume: bool, overwrite: bool) -> RunFolder:
        """The run folder of an output folder. What it holds is used where it fits, whoever computed it.

        Raises `RankwiseError` where an interrupted run is there and neither flag was given, and where it is still running.
        """
        path = Path(os.path.realpath(output) + ".run")
        if distributed.rank() == 0 and os.path.exists(path):
            if not (resume or overwrite):
                raise RankwiseError(f"an interrupted run is in {path}: go on with it (--resume), or overwrite it (--overwrite)")
            cls(path).hold()
        return cls(path)

    def hold(self) -> None:
        """Keep other processes out until this one has removed the folder, or ends. Raises `RankwiseError` where one is in it."""
        if self.path is None or self.shared or self.path in _locks or fcntl is None or distributed.rank() > 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a")  # noqa: SIM115  open for as long as it is held
            _lock(lock)
        except BlockingIOError:
            raise RankwiseError(f"another run is at work in {self.path}: wait for it, or name another output") from None
        except OSError as error:
            raise RankwiseError(f"cannot write {self.path}: {error.strerror}") from None
        _locks[self.path] = lock

    @property
    def finished(self) -> bool:
        """Whether the run came so far that its result may be in place, and only this folder is left to be removed."""
        return self.path is not None and (self.path / FINISHED).exists()

    def finish(self) -> None:
        """Note that from here on the result may be in place."""
        if self.path is not None:
            write_whole(self.path / FINISHED, Path.touch)

    def cached(self, stage: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of `stage` for `key`: read where they are whole on disk, else computed and written atomically.

        Either way they are contiguous: another layout would be multiplied in another order, to other last bits. Raises
        `RankwiseError` where they cannot be written, and where another process is at work in the folder.
        """
        found = self._found(f"{stage}-{key}.safetensors")
        if found is not None:
            return found
        if self.path is None:
            return _contiguous(compute())
        if self.path.parent.exists():  # else nobody is in it, and should the computation fail, nothing shall be left behind
            self.hold()
        file = self.file(stage, key)
        if file.exists():
            kept = _read(file)
            if kept is not None:
                return kept
            logger.warning("%s is damaged: it is computed again", file)
        try:
            tensors = _contiguous(compute())
        except BaseException:
            if self.path in _locks and [file.name for file in self.path.iterdir()] == [LOCK]:
                self.remove()
            raise
        self.hold()
        write_tensors(file, tensors)
        return tensors

    def file(self, stage: str, key: str) -> Path:
        """Where `cached` writes; the run has a folder."""
        assert self.path is not None
        return self.path / f"{stage}-{key}.safetensors"

    def kept_at(self, stage: str, key: str) -> Path | None:
        """The file that `cached` has written, or read in the known run folder; None where a run keeps nothing."""
        if self.path is None:
            return None
        file = self.file(stage, key)
        return file if file.exists() or self.known is None else self.known / file.relative_to(self.path)

    def _found(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a file of the known run folder, None where it is not there or not whole."""
        return None if self.known is None else _read(self.known / name)

    @property
    def keeps(self) -> bool:
        """Whether anything is read or written, so that keys are worth their computation."""
        return self.path is not None or self.known is not None

    def cached_values(self, stage: str, key: str, compute: Callable[[], Any]) -> Any:
        """As `cached`, for plain values: what JSON makes of them, whether read or just computed."""
        return notes_in(self.cached(stage, key, lambda: as_notes(compute())))

    def together(self, stage: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `cached`, for all processes of a run at once: all compute where the first finds nothing, and go on with what it
        has written."""
        if self.path is None or distributed.size() == 1 or self._found(f"{stage}-{key}.safetensors") is not None:
            return self.cached(stage, key, compute)
        file = self.file(stage, key)
        tensors: dict[str, Tensor] | None = None
        if not distributed.of_the_first(lambda: file.exists() and _read(file) is not None):
            tensors = compute()
        if distributed.rank() == 0:
            self.cached(stage, key, lambda: tensors or {})
        distributed.wait()
        return self.cached(stage, key, lambda: tensors or {})

    def checkpoint(self, stage: str, key: str) -> Checkpoint:
        """Where the state of a long stage is kept until its result is."""
        return Checkpoint(None if self.path is None else self.path / f"{stage}-{key}.part.safetensors")

    def hand_over(self, to: Path) -> None:
        """Make a finished run the folder `to` of a result, on the same disk, and let others in."""
        assert self.path is not None
        os.replace(self.path, to)
        if self.path in _locks:
            _locks.pop(self.path).close()
        for name in (LOCK, FINISHED):
            (to / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the run, and let others in."""
        if self.path is not None and self.path.exists() and distributed.rank() == 0:
            if self.path in _locks:
                _locks.pop(self.path).close()  # first: NFS removes no folder that has an open file in it
            shutil.rmtree(self.path)
            flush(self.path.parent)


@dataclass
class Checkpoint:
    """The state of work that goes on step by step: a file that is written over now and then. Without a file, nothing is kept."""

    file: Path | None = None
    written: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def read(self) -> dict[str, Tensor] | None:
        """The last state; None where there is none, or it is damaged."""
        return None if self.file is None else _read(self.file)

    def write(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Keep the state if it is time to: of the first process, once a minute, or seldom enough to cost a twentieth at most."""
        since = time.monotonic()
        if self.file is None or distributed.rank() > 0 or since - self.written < max(CHECKPOINT_EVERY, 20 * self.took):
            return
        write_tensors(self.file, state())
        self.written = time.monotonic()
        self.took = self.written - since

    def remove(self) -> None:
        """Forget the state."""
        if self.file is not None and distributed.rank() == 0:
            self.file.unlink(missing_ok=True)


def as_notes(values: Any) -> dict[str, Tensor]:
    """Plain values as a tensor of bytes, to be kept with others."""
    return {NOTES: torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}


def notes_in(tensors: dict[str, Tensor]) -> Any:
    """The plain values that `as_notes` has put among these tensors."""
    return json.loads(bytes(tensors[NOTES].tolist()))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that a run folder or an artifact must hold. Raises `RankwiseError` where it is not as written."""
    tensors = _read(file)
    if tensors is None:
        raise RankwiseError(f"{file} is missing or damaged: decompose again")
    return tensors


def tensors_named(file: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """Copies of those of a file's tensors, as far as it has them; it was whole when it was opened first. Raises `RankwiseError`
    where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys() if name in wanted}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RankwiseError(f"{file} cannot be read: {reason(error)}") from None


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file whole or not at all, with the digest of its content. Raises `RankwiseError` where it cannot be written."""
    on_host = {name: tensor.cpu() for name, tensor in _contiguous(tensors).items()}
    write_whole(file, lambda path: save_file(on_host, path, metadata={"digest": _digest_of(on_host)}))


def _read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, or None where it is not as it was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
            written = (opened.metadata() or {}).get("digest")
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError):  # a damaged header fails in many ways
        return None
    return tensors if written == _digest_of(tensors) else None
