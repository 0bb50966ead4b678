"""Commands that measure what compression costs and what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.arguments import (
    AddToReport,
    AsJson,
    Folder,
    Model,
    Verbose,
    command,
    interruptible,
    names,
    numbers,
    silent,
)
from rankwise.options import (
    ContestOptions,
    ExploreOptions,
    LoadingOptions,
    ReadingOptions,
)
from rankwise.plain import to_json


@command(*ReadingOptions.__annotations__)
def evaluate(
    folder: Folder,
    reference: Annotated[str | None, typer.Option(help="The original model; without it, the bundled one.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to judge on: anything that --calibration of compress takes except self; or "
            "wikitext2, c4 or ptb, prepared as in the papers, with :FILE for a local copy. "
            "Repeatable; the first text is the headline (default: stdlib:held-out).",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, comma-separated: names, YAML files or folders. Repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only the first LIMIT items of each task (default: all).",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Examples shown before each item (default: as the task says).",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt that both models continue. Repeatable (default: passages of the first text).",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window (default: the context, at most 2048).",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Windows to draw at random (default: all of the text).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for drawing the windows.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for cached results (default: $RANKWISE_CACHE, else ~/.cache/rankwise).",
        ),
    ] = None,
    add_to_report: AddToReport = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    **reading: Any,
) -> None:
    """Measure what compression cost on the same tokens: perplexity, KL, agreement, tasks, generations.

    Goes on where it was interrupted.
    """
    from rankwise import bundled
    from rankwise.evaluation.evaluate import evaluate
    from rankwise.integration.result import EVALUATION
    from rankwise.reporting.page import add_to_page, refuse_no_page

    if add_to_report:
        refuse_no_page(folder)
    with silent(as_json), interruptible("the same command goes on from here"):
        report = evaluate(
            folder,
            reference or bundled.MODEL,
            text or ["stdlib:held-out"],
            tasks=[name for part in tasks or [] for name in names(part)],
            limit=limit,
            shots=shots,
            prompts=prompt or (),
            cache=cache,
            length=length,
            samples=samples,
            seed=seed,
            **reading,
        )
    if add_to_report:
        add_to_page(folder, EVALUATION, report)
    if as_json:
        print(to_json(report))
        return
    from rankwise.reporting.evaluation import print_evaluation

    print_evaluation(report)


@command("calibration", *ContestOptions.__annotations__)
def compare(
    model: Model = None,
    rates: Annotated[str, typer.Option(help="Rates to try, comma-separated.")] = "0.1,0.2,0.3,0.4",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text to judge on. Repeatable; the first text is plotted.",
        ),
    ] = None,
    allocations: Annotated[
        str,
        typer.Option(
            help="Allocations to try, comma-separated, such as 'llrc, kl-knapsack points=3' (default: all).",
        ),
    ] = "",
    decompositions: Annotated[
        str, typer.Option(help="Decompositions to try, comma-separated (default: each allocation's own).")
    ] = "",
    judge_samples: Annotated[int | None, typer.Option(help="Windows of each text to judge on (default: all).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json and the page.")] = Path("contest"),
    as_json: AsJson = False,
    verbose: Verbose = False,
    **asked: Any,
) -> None:
    """Measure every allocation at every rate on the same statistics, to find the one for this model.

    Goes on where it was interrupted.
    """
    from rankwise.contest import hold_contest
    from rankwise.integration.result import PAGE
    from rankwise.reporting.contest import print_contest
    from rankwise.reporting.page import report

    wanted = numbers("--rates", rates, float, "0.1,0.2")
    with silent(as_json), interruptible("the same command goes on from here"):
        results = hold_contest(
            model,
            wanted,
            text or (["stdlib:held-out"] if model is None else []),
            output,
            allocations=names(allocations),
            decompositions=names(decompositions),
            judge_samples=judge_samples,
            **asked,
        )
    report([output], output / PAGE)
    if as_json:
        print(to_json(results))
        return
    print_contest(results)
    print(f"written to {output}: open {output / PAGE} in a browser")


@command("calibration", *ExploreOptions.__annotations__)
def explore(
    model: Model = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text to judge on. Repeatable; the first text is plotted (default: a part "
            "of the calibration text that is kept for it).",
        ),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            help="Rates to try for low rank, comma-separated.",
        ),
    ] = "0.05,0.1,0.2,0.3,0.4,0.5",
    bits: Annotated[
        str, typer.Option(help="Average bits per number to try, from 2 to 8, comma-separated.")
    ] = "8,6,5,4,3.5,3,2.5",
    judge_samples: Annotated[
        int | None, typer.Option(help="Windows of each text to judge on (default: enough for 4,096 tokens).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for explored.json and the page.")] = Path("explored"),
    as_json: AsJson = False,
    verbose: Verbose = False,
    **asked: Any,
) -> None:
    """Show how far to compress and with what: low rank, bits or both against bytes and speed, on one page.

    All are measured on the same statistics, with effort quick unless told. Goes on where it was interrupted.
    """
    from rankwise.exploring import explore
    from rankwise.integration.result import PAGE
    from rankwise.reporting.explored import print_explored
    from rankwise.reporting.page import report

    wanted = numbers("--rates", rates, float, "0.1,0.2"), numbers("--bits", bits, float, "8,4,3.5")
    texts = text or (["stdlib:held-out"] if model is None else [])
    with silent(as_json), interruptible("the same command goes on from here"):
        found = explore(model, text=texts, rates=wanted[0], bits=wanted[1], judge_samples=judge_samples, output=output, **asked)
    report([output], output / PAGE)
    if as_json:
        print(to_json(found))
        return
    print_explored(found)
    print(f"written to {output}: open {output / PAGE} in a browser")


@command(*LoadingOptions.__annotations__)
def bench(
    folder: Folder,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The original model, to compute the ratios from.",
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,16",
    prompt: Annotated[
        int | None, typer.Option(help="Tokens in the prompt (default: 512, or as many as the model takes).")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Times to run each model, in turn; medians are reported.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads (default: as many as torch chooses).",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Run through torch.compile, on a GPU with CUDA graphs.",
        ),
    ] = False,
    add_to_report: AddToReport = False,
    as_json: AsJson = False,
    **loading: Any,
) -> None:
    """Measure speed and memory of prefill and decode on this machine, beside the original and the ideal."""
    from rankwise.integration.result import SPEED
    from rankwise.reporting.page import add_to_page, refuse_no_page
    from rankwise.runtime.bench import bench

    if add_to_report:
        refuse_no_page(folder)
    sizes = numbers("--batches", batches, int, "1,16")
    options = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "threads": threads, **loading}
    with silent(as_json):
        report = bench(folder, reference, batches=sizes, compiled=compiled, **options)
    if add_to_report:
        add_to_page(folder, SPEED, report)
    if as_json:
        print(to_json(report))
        return
    from rankwise.reporting.terminal import print_speed

    print_speed(report)
