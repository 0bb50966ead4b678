"""Several processes that share one run: `torchrun` starts them, each does its part, and all go on with the same numbers.

Every process runs the whole program on its own copy of the model, or of a block. Batches and matrices are dealt out, sums are
added up, and the first process alone writes and prints. They join when the first sum is due: what is wrong with the input is
found, and said once, before that. In a process of its own nothing here does anything.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from rankwise.errors import RankwiseError, is_out_of_memory
from rankwise.launcher import rank as rank
from rankwise.launcher import size as size

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = timedelta(days=1)  # a slow process may decompose for hours; when one dies, torchrun ends the others at once
TO_JOIN = timedelta(minutes=10)  # where no launcher sees to it that all of them come


def _together(work: Callable[..., T]) -> Callable[..., T]:
    """`work` as a collective operation. Raises `RankwiseError` where another process has died."""

    @functools.wraps(work)
    def act(*arguments: Any) -> T:
        try:
            if not dist.is_initialized():
                _join()
            return work(*arguments)
        except RuntimeError as error:  # torch's own errors of a lost connection are of this class
            if is_out_of_memory(error):
                raise
            raise RankwiseError(
                f"process {rank()} of {size()} lost the others ({str(error).splitlines()[0]}): the same command with --resume "
                "goes on from here"
            ) from None

    return act


def _join() -> None:
    """Meet the other processes. Raises `RankwiseError` where they do not come."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    waits = f"process {rank()} of {size()} waits for the others at {place}; not under torchrun? unset WORLD_SIZE"
    if not dist.is_torchelastic_launched():
        logger.warning(waits)
    try:
        store, *_ = next(rendezvous("env://", rank(), size(), timeout=TO_JOIN))
    except (RuntimeError, ValueError) as error:
        raise RankwiseError(f"{waits} ({str(error).splitlines()[0]})") from None
    store.set_timeout(PATIENCE)
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group(store=store, rank=rank(), world_size=size(), timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)


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
    """This process's share of the items: with n processes, every n-th one."""
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
