"""What compression does to tasks of knowledge, reasoning and reading, which perplexity hides.

    python benchmarks/tasks.py MODEL RESULT [RESULT ...] [--limit 200]

The original, the original in int8 (round to nearest, groups of 64) and every result folder of it answer the same items of
the tasks in examples/tasks: the first `--limit` of each. Needs the data folder beside the repository (--data) and
lm-evaluation-harness. All that is found is printed to benchmarks/results/tasks.md; answers are kept in --work.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from main_job import HERE
from real_models import GROUP, as_quantized, load, machine
from transformers import AutoTokenizer

from rankwise.evaluation.pair import Pair
from rankwise.evaluation.tasks import load_tasks
from rankwise.integration.files import read_json
from rankwise.integration.result import REPORT
from rankwise.layers.linear import is_linear
from rankwise.run_folder import RunFolder

RESULTS = HERE / "results" / "tasks.md"
EXAMPLES = HERE.parent / "examples" / "tasks"


def in_int8(folder: Path) -> Any:
    model = load(folder)
    for module in model.base_model.modules():
        if is_linear(module):
            as_quantized(module, 8)
    return model


def answered(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the tasks say of each model beside the original: model -> task -> figures."""
    files = args.work / "tasks"
    shutil.copytree(EXAMPLES, files, dirs_exist_ok=True)
    for file in (args.data / "tasks").glob("*.jsonl"):
        shutil.copy(file, files)
    tasks = load_tasks([str(files / "*.yaml")], args.limit)
    dense, tokenizer, answers = load(args.model), AutoTokenizer.from_pretrained(args.model), RunFolder(args.work / "answers")
    found = {f"int8, groups of {GROUP}": Pair(dense, in_int8(args.model), tokenizer, answers).tasks(tasks)}
    for folder in args.results:
        rate = read_json(folder / REPORT)["rate"]
        found[f"rate {rate:g}"] = Pair(dense, load(folder), tokenizer, answers).tasks(tasks)
    return found


def table(found: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> str:
    """A row for each task: accuracies, and what is lost with the interval of the paired difference."""
    tasks = next(iter(found.values()))
    lines = [
        f"### {args.model.name}: {args.limit} items of each task\n",
        "Accuracy in per cent (difference to the original, and its 95 % interval; items right before and wrong now, or the",
        f"other way). {machine()}. In italics where the original itself is not above chance: there a difference tells nothing.\n",
        f"| task | by guessing | original | {' | '.join(found)} |",
        "|---|---|---|" + "---|" * len(found),
    ]
    for task, figures in tasks.items():
        own = figures["metrics"]["acc"]
        chance = "free answer" if figures["chance"] is None else f"{100 * figures['chance']:.0f}"
        name = task.removeprefix("local_")
        above = own["above_chance"] is None or own["above_chance"]["reference"]
        cells = [_cell(each[task]["metrics"]["acc"]) for each in found.values()]
        lines.append(f"| {name if above else f'*{name}*'} | {chance} | {100 * own['reference']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(metric: Mapping[str, Any]) -> str:
    low, high = metric["intervals"]["difference"]
    figures = metric["compressed"], metric["difference"], low, high, metric["flips"]
    return "{:.0f} ({:+.0f}: {:+.0f} to {:+.0f}; {:.0f})".format(*(100 * figure for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-tasks")
    args = parser.parse_args()
    RESULTS.write_text(table(answered(args), args))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
