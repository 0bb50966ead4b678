"""Several processes that share one run: `torchrun` starts them, each does its part, and all go on with the same numbers.

Every process runs the whole program on its own copy of the model, or of a block. Batches and matrices are dealt out, sums are
added up, and the first process alone writes and prints. They join when the first sum is due: what is wrong with the input is
found, and said once, before that. In a process of its own nothing here does anything.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from rankwise.errors import RankwiseError, is_out_of_memory

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # with the slowest: one may decompose for long; of one that dies torchrun tells at once


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _together(work: Callable[..., T]) -> Callable[..., T]:
    """`work` as a collective operation. Raises `RankwiseError` where another process has died."""

    @functools.wraps(work)
    def act(*arguments: Any) -> T:
        try:
            if not dist.is_initialized():
                dist.init_process_group(timeout=PATIENCE)
                atexit.register(dist.destroy_process_group)
            return work(*arguments)
        except RuntimeError as error:  # torch's own errors of a lost connection are of this class
            if is_out_of_memory(error):
                raise
            raise RankwiseError(
                f"process {rank()} of {size()} lost the others ({str(error).splitlines()[0]}): the same command with --resume "
                "goes on from here"
            ) from None

    return act


@_together
def _all_reduce(tensor: Tensor) -> None:
    dist.all_reduce(tensor)


@_together
def _all_gather(value: Any) -> list[Any]:
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def idle_gpus(device: str) -> str | None:
    """What to tell a user whose one process leaves GPUs idle: how all of them work. None where there is nothing to tell."""
    gpus = torch.cuda.device_count()
    if device != "auto" or size() > 1 or gpus < 2:
        return None
    return f"one of {gpus} GPUs is used: torchrun --nproc-per-node {gpus} -m rankwise ... shares the work among all"


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: every so manieth."""
    return items[rank() :: size()]


def collected(parts: list[T]) -> list[T]:
    """What all processes found for their part of the items, in the items' own order."""
    if size() == 1:
        return parts
    found = _all_gather(parts)
    return [found[i % size()][i // size()] for i in range(sum(map(len, found)))]


def everyones(value: T) -> list[T]:
    """The values of all processes, in their order."""
    return [value] if size() == 1 else _all_gather(value)


def of_the_first(find: Callable[[], T]) -> T:
    """What the first process finds, which alone looks."""
    if size() == 1:
        return find()
    found: T = _all_gather(find() if rank() == 0 else None)[0]
    return found


def add_up(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place; the same at each run with as many processes."""
    if size() > 1:
        _all_reduce(tensor)
    return tensor


def wait() -> None:
    """Go on when all have come here."""
    everyones(None)
