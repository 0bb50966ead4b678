"""Commands that show what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.arguments import (
    AsJson,
    Folder,
    command,
    silent,
)
from rankwise.plain import to_json


@command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Result folders, and folders written by compare or explore.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one page with what was gained, what it cost, the ranks, and the command to make it again."""
    from rankwise.reporting import page

    page.report(folders, output)
    print(f"written to {output}: open it in a browser")


@command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show the rank of every matrix."""
    from rankwise.reporting.inspect import inspect
    from rankwise.reporting.terminal import print_ranks

    with silent(as_json):
        rows = inspect(folder)
    if as_json:
        print(to_json({"matrices": rows}))
    else:
        print_ranks(rows)


@command()
def methods(as_json: AsJson = False) -> None:
    """List every method that --allocation and --decomposition take, and when to use it."""
    from rankwise.reporting.methods import all_methods, print_methods

    found = all_methods()
    if as_json:
        print(to_json(found))
    else:
        print_methods(found)
