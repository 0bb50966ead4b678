"""Where a run keeps what it has computed, so that it can be killed and resumed.

Every result is a safetensors file named after its stage and the digest of all it was computed from: a changed option leaves
the results that do not depend on it in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.errors import RankwiseError


def digest(*parts: Any) -> str:
    """A short digest of values with a stable text form, and of tensors by their dtype, shape and bytes."""
    state = hashlib.blake2b(digest_size=10)
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype} {tuple(part.shape)}".encode())
            state.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """The digest of a model: its config and every parameter's name, shape and bytes."""
    parts: list[Any] = [str(getattr(model, "config", ""))]
    for name, parameter in model.named_parameters():
        parts += [name, tuple(parameter.shape), parameter]
    return digest(*parts)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `RankwiseError` where it is missing or not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise RankwiseError(f"{file} cannot be read: {error}") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class RunFolder:
    """Results on disk; with no path, nothing is kept. What `known` holds is read from there, and nothing written to it."""

    path: Path | None = None
    known: Path | None = None

    @classmethod
    def beside(cls, output: Path, resume: bool, overwrite: bool) -> RunFolder:
        """The run folder of an output folder. What it holds is used where it fits, whoever computed it.

        Raises `RankwiseError` where an interrupted run is there, which may still be running, and neither flag was given.
        """
        path = output.resolve().with_name(output.resolve().name + ".run")
        if path.exists() and not (resume or overwrite):
            raise RankwiseError(f"an interrupted run is in {path}: go on with it (--resume), or overwrite it (--overwrite)")
        return cls(path)

    def cached(self, stage: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of `stage` for `key`: read where they are whole on disk, else computed and written atomically.

        Either way they are contiguous: another layout would be multiplied in another order, to other last bits. Raises
        `RankwiseError` where they cannot be written.
        """
        name = f"{stage}-{key}.safetensors"
        if self.known is not None and (self.known / name).exists():
            return read_tensors(self.known / name)
        if self.path is None:
            return _contiguous(compute())
        file = self.path / name
        if file.exists():
            try:
                return read_tensors(file)
            except RankwiseError:
                file.unlink(missing_ok=True)  # cut short by a full disk or a crash of the machine
        tensors = _contiguous(compute())
        temporary = file.with_suffix(f".{os.getpid()}.part")  # another run may be writing the same result
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: t.cpu() for name, t in tensors.items()}, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RankwiseError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from None
        return tensors

    def remove(self) -> None:
        """Forget the run."""
        if self.path is not None and self.path.exists():
            shutil.rmtree(self.path)
