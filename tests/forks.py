"""Commands in processes that have the libraries loaded: forks of the test's own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import distributed
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SECONDS = 300
Work = Callable[[Path, tuple[str, ...]], None]  # in a folder, with arguments


class Fork(NamedTuple):
    """A command that runs; its `process` ends with its exit code, or the negative number of the signal that ended it."""

    process: multiprocessing.process.BaseProcess
    output: Path

    def communicate(self) -> tuple[str, str]:
        """What it wrote to standard output and standard error, when it has ended."""
        self.process.join(SECONDS)
        self.process.kill()  # what takes longer never ends
        self.process.join()
        return (self.output / "1").read_text(), (self.output / "2").read_text()


def forked(folder: Path, *arguments: str) -> Fork:
    """`rankwise` with these arguments, begun in a folder."""
    output = Path(tempfile.mkdtemp())
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, arguments, output))
    process.start()
    return Fork(process, output)


def launched(number: int, folder: Path, *arguments: str, run: Work | None = None) -> Fork:
    """The same, or what `run` does, in processes that work together, under torchrun's own agent: it is the process that is
    waited for."""
    output = Path(tempfile.mkdtemp())
    process = multiprocessing.get_context("fork").Process(
        target=_launch, args=(number, folder, arguments, output, run or _command)
    )
    process.start()
    return Fork(process, output)


def _launch(number: int, folder: Path, arguments: tuple[str, ...], output: Path, run: Work) -> None:
    _write_to(output)
    more = {"run_id": "none", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork", "max_restarts": 0}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=number, **more)
    elastic_launch(config, run)(folder, arguments)


def _run(folder: Path, arguments: tuple[str, ...], output: Path) -> None:
    _write_to(output)
    _command(folder, arguments)


def _write_to(output: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open(output / str(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    logging.root.handlers.clear()  # they are pytest's


def _command(folder: Path, arguments: tuple[str, ...]) -> None:
    from rankwise.cli import main

    os.chdir(folder)
    sys.argv = ["rankwise", *arguments]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise  # else it is a value that the agent waits for
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
