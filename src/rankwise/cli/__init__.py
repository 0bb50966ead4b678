"""The command line: one command per task. Heavy imports stay inside the commands, so that help is instant."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from typing import Annotated, Any

import typer

from rankwise.cli import compress, judge, show  # noqa: F401 they add their commands, in the order of --help
from rankwise.cli.arguments import COMMANDS
from rankwise.errors import RankwiseError, is_out_of_memory
from rankwise.launcher import rank
from rankwise.options import with_options

UsageError: Any = typer.BadParameter.__base__  # typer has click's classes inside it or beside it, by its version
PATIENCE = 3  # seconds the other processes wait: the first one reports the error, and torchrun then ends them all
OUT_OF_MEMORY = "use shorter windows (--length), or compress block by block (--memory); --resume goes on"
HELP = "Make a Hugging Face language model smaller and faster, with ranks learned by gradient."


def application(called: Collection[str] | None = None) -> typer.Typer:
    """The command line. The options that come from the recipe, which takes a moment to load, are there for the commands that
    are called; by default for all."""
    app = typer.Typer(name="rankwise", help=HELP, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(rankwise)
    for function, fields in COMMANDS.items():
        app.command()(with_options(function, fields if called is None or function.__name__ in called else ()))
    return app


def rankwise(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda wanted: _tell_version(wanted), help="Print the version.")
    ] = False,
) -> None:
    """The options of rankwise itself."""


def _tell_version(wanted: bool) -> None:
    if wanted:
        from rankwise import __version__

        print(f"rankwise {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point: what users can put right ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports it where it is; what it lacks, nothing here needs
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # heeded by transformers too, for loading and writing
    others = rank() > 0  # of several processes, the first alone shows how far it is
    if others:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        sys.exit(application(sys.argv[1:2])(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
    except RankwiseError as error:
        if others:
            time.sleep(PATIENCE)
            print(f"error in process {rank()}: {error}", file=sys.stderr)
        else:
            print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0] or "out of memory"
        print(f"error: {said}: {OUT_OF_MEMORY}", file=sys.stderr)
    sys.exit(2)
