"""What several commands have in common: arguments, and how they speak to the terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.errors import RankwiseError

Command = Callable[..., None]
COMMANDS: dict[Command, tuple[str, ...]] = {}  # and the fields of the recipe that each has options for

Model = Annotated[
    str | None,
    typer.Argument(
        help="A folder or a name on the hub (default: the bundled model).",
    ),
]
Folder = Annotated[Path, typer.Argument(help="A folder that rankwise wrote.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
AddToReport = Annotated[
    bool,
    typer.Option(
        "--add-to-report",
        help="Keep the figures in the folder and show them on its page.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object on standard output and nothing else.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=lambda wanted: tell_more(wanted),
        help="Log what is found on the way.",
    ),
]


def command(*fields: str) -> Callable[[Command], Command]:
    """A decorator for commands; `fields` are those of the recipe that the command takes as keywords."""

    def add(function: Command) -> Command:
        COMMANDS[function] = fields
        return function

    return add


@contextmanager
def silent(as_json: bool = False) -> Iterator[None]:
    """No bars of transformers inside, which has one for each model. With --json, whatever is written to standard output, by
    libraries in C too, goes to standard error."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as theirs

    if theirs.is_progress_bar_enabled():
        theirs.disable_progress_bar()
        enable_progress_bars()  # of downloads, which the line above has switched off too
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def interruptible(way_on: str) -> Iterator[None]:
    """An interrupt from the keyboard ends the command with a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {way_on}", file=sys.stderr)
        raise typer.Exit(130) from None


def tell_more(wanted: bool) -> None:
    logging.getLogger("rankwise").setLevel(logging.INFO if wanted else logging.WARNING)


def names(text: str) -> list[str]:
    """The comma-separated names in a text."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str, kind: Callable[[str], Any], example: str) -> list[Any]:
    """The comma-separated numbers in a text. Raises `RankwiseError` where there are others."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise RankwiseError(
            f"{option} {text!r} is no list of numbers: separate them by commas, as in {example}",
        ) from None
