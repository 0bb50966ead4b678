"""Commands that write a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.arguments import (
    AsJson,
    Folder,
    Model,
    Overwrite,
    Resume,
    Verbose,
    command,
    interruptible,
    silent,
)
from rankwise.options import (
    CompressOptions,
    DecomposeOptions,
    RefineOptions,
)
from rankwise.plain import to_json


@command("rate", "calibration", "allocation", *CompressOptions.__annotations__)
def compress(
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe.yaml, or a folder with one, which gives every option not given here.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Instead of a rate: the plan to apply, a result folder or its ranks.json, edited or not.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Stop at the plan: print it with its predicted KL, and write it to the file -o if given.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The result folder (default: compressed); with --dry-run, the file for the plan.",
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    **asked: Any,
) -> None:
    """Compress MODEL and write a folder that transformers loads like any other.

    Under torchrun (torchrun --nproc-per-node 2 -m rankwise compress ...) its processes share the work.
    """
    from rankwise import distributed
    from rankwise.pipeline import compress
    from rankwise.pipeline import plan as choose

    asked |= {"recipe": recipe, "plan": plan, "overwrite": overwrite, "resume": resume}
    folder = output or Path("compressed")
    with silent(as_json), interruptible("the same command with --resume goes on from here"):
        if dry_run:
            chosen = choose(model, output=output, **asked)
        else:
            result = compress(model, output=folder, **asked)
    if distributed.rank() > 0:
        return
    if dry_run:
        print(chosen.to_json() if as_json else chosen)
        return
    if as_json:
        print(to_json(result.report))
        return
    from rankwise.integration.result import PAGE
    from rankwise.reporting.terminal import print_report

    print_report(result.report)
    print(f"written to {folder}: import rankwise, then from_pretrained({str(folder)!r})")
    print(f"a page that shows what it cost: {folder / PAGE}")


@command("calibration", *DecomposeOptions.__annotations__)
def decompose(
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact's folder.")] = Path("decomposed"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    **asked: Any,
) -> None:
    """Write one folder from which compress makes a model of any rate within seconds."""
    from rankwise.decomposing import decompose

    with silent(), interruptible("the same command with --resume goes on from here"):
        artifact = decompose(model, output, overwrite=overwrite, resume=resume, **asked)
    print(f"{len(artifact.shapes)} matrices decomposed, written to {output}: rankwise compress {output} --rate ...")


@command("calibration", "refine", *RefineOptions.__annotations__)
def refine(
    folder: Folder,
    reference: Annotated[str | None, typer.Option(help="The original model; without it, the bundled one.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text from another source, as for evaluate: a refinement that makes it worse is undone.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The result folder.")] = Path("refined"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    **asked: Any,
) -> None:
    """Train the weights in FOLDER against the original model; ranks and bytes stay the same.

    More text, and text like that of your use, helps more here than more passes over it.
    """
    from rankwise.refining import refine

    with silent(as_json), interruptible("the same command with --resume goes on from here"):
        result = refine(folder, reference, text=text, output=output, overwrite=overwrite, resume=resume, **asked)
    if as_json:
        print(to_json(result.report))
        return
    from rankwise.reporting.terminal import print_report

    print_report(result.report)
    print(f"written to {output}: import rankwise, then from_pretrained({str(output)!r})")


@command()
def densify(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the plain dense equivalent: same outputs, the original's size, no rankwise needed."""
    from rankwise.integration.densify import densify

    with silent():
        densify(folder, output, overwrite)
    print(f"written to {output}")
