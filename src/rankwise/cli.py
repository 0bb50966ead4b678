"""The command line: one command per task. Heavy imports stay inside the commands, so that help is instant."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.errors import RankwiseError, is_out_of_memory
from rankwise.launcher import rank
from rankwise.options import (
    CompressOptions,
    ContestOptions,
    DecomposeOptions,
    ExploreOptions,
    LoadingOptions,
    ReadingOptions,
    RefineOptions,
    with_options,
)
from rankwise.plain import to_json

UsageError: Any = typer.BadParameter.__base__  # typer has click's classes inside it or beside it, by its version
PATIENCE = 3  # seconds the other processes wait: the first one reports the error, and torchrun then ends them all
OUT_OF_MEMORY = "use shorter windows (--length), or compress block by block (--memory); --resume goes on"

HELP = "Make a Hugging Face language model smaller and faster, with ranks learned by gradient."

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
        callback=lambda wanted: _tell_more(wanted),
        help="Log what is found on the way.",
    ),
]


def command(*fields: str) -> Callable[[Command], Command]:
    """A decorator for commands; `fields` are those of the recipe that the command takes as keywords."""

    def add(function: Command) -> Command:
        COMMANDS[function] = fields
        return function

    return add


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
    with _silent(as_json), _interruptible("the same command with --resume goes on from here"):
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


@command()
def methods(as_json: AsJson = False) -> None:
    """List every method that --allocation and --decomposition take, and when to use it."""
    from rankwise.reporting.methods import all_methods, print_methods

    found = all_methods()
    if as_json:
        print(to_json(found))
    else:
        print_methods(found)


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

    with _silent(), _interruptible("the same command with --resume goes on from here"):
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

    with _silent(as_json), _interruptible("the same command with --resume goes on from here"):
        result = refine(folder, reference, text=text, output=output, overwrite=overwrite, resume=resume, **asked)
    if as_json:
        print(to_json(result.report))
        return
    from rankwise.reporting.terminal import print_report

    print_report(result.report)
    print(f"written to {output}: import rankwise, then from_pretrained({str(output)!r})")


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
    with _silent(as_json), _interruptible("the same command goes on from here"):
        report = evaluate(
            folder,
            reference or bundled.MODEL,
            text or ["stdlib:held-out"],
            tasks=[name for part in tasks or [] for name in _names(part)],
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

    wanted = _numbers("--rates", rates, float, "0.1,0.2")
    with _silent(as_json), _interruptible("the same command goes on from here"):
        results = hold_contest(
            model,
            wanted,
            text or (["stdlib:held-out"] if model is None else []),
            output,
            allocations=_names(allocations),
            decompositions=_names(decompositions),
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

    wanted = _numbers("--rates", rates, float, "0.1,0.2"), _numbers("--bits", bits, float, "8,4,3.5")
    texts = text or (["stdlib:held-out"] if model is None else [])
    with _silent(as_json), _interruptible("the same command goes on from here"):
        found = explore(model, text=texts, rates=wanted[0], bits=wanted[1], judge_samples=judge_samples, output=output, **asked)
    report([output], output / PAGE)
    if as_json:
        print(to_json(found))
        return
    print_explored(found)
    print(f"written to {output}: open {output / PAGE} in a browser")


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

    with _silent(as_json):
        rows = inspect(folder)
    if as_json:
        print(to_json({"matrices": rows}))
    else:
        print_ranks(rows)


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
    sizes = _numbers("--batches", batches, int, "1,16")
    options = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "threads": threads, **loading}
    with _silent(as_json):
        report = bench(folder, reference, batches=sizes, compiled=compiled, **options)
    if add_to_report:
        add_to_page(folder, SPEED, report)
    if as_json:
        print(to_json(report))
        return
    from rankwise.reporting.terminal import print_speed

    print_speed(report)


@command()
def densify(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the plain dense equivalent: same outputs, the original's size, no rankwise needed."""
    from rankwise.integration.densify import densify

    with _silent():
        densify(folder, output, overwrite)
    print(f"written to {output}")


@contextmanager
def _silent(as_json: bool = False) -> Iterator[None]:
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
def _interruptible(way_on: str) -> Iterator[None]:
    """An interrupt from the keyboard ends the command with a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {way_on}", file=sys.stderr)
        raise typer.Exit(130) from None


def _tell_version(wanted: bool) -> None:
    if wanted:
        from rankwise import __version__

        print(f"rankwise {__version__}")
        raise typer.Exit


def _tell_more(wanted: bool) -> None:
    logging.getLogger("rankwise").setLevel(logging.INFO if wanted else logging.WARNING)


def _names(text: str) -> list[str]:
    """The comma-separated names in a text."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, kind: Callable[[str], Any], example: str) -> list[Any]:
    """The comma-separated numbers in a text. Raises `RankwiseError` where there are others."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise RankwiseError(
            f"{option} {text!r} is no list of numbers: separate them by commas, as in {example}",
        ) from None


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


if __name__ == "__main__":
    main()
