"""Every allocator at every rate on the same statistics: KL on held-out text, over calibration seeds, on three domains.

    python benchmarks/allocators.py [--models babyllama-tok105 stories260k bundled] [--metrics kronecker whitened]

Calibration: 1,024 windows of 256 tokens, drawn by the seed from the first 2,000 stories (the bundled model: from the standard
library's training split). Judged on windows of the last 500 stories (the held-out split), of WikiText-2 and of C4, the same for
every method and seed. Methods that take minutes for each rate run for the models in --slow, on the first seed and metric.
Needs the data folder beside the repository (--data). Writes benchmarks/results/allocators.md; what it computed is in --work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from main_job import LENGTH, stories

from rankwise.contest import hold_contest

HERE = Path(__file__).parent
TRAINING = ("llrc", "llrc:paper", "ars", "ara", "dobi")
RANKS_ALONE, FULL = "llrc value_steps=0", "llrc"
TIMED_RATE = 0.3
METHODS = [
    "uniform",
    "effective-rank",
    "heavy-tail",
    "energy",
    "error-bound",
    "error-bound:uniform-error",
    "knapsack",
    "zero-sum",
    "mask-fisher",
    "kl-knapsack",
    "kl-knapsack points=3",
    RANKS_ALONE,
    FULL,
]
SLOW = ["strs", "evolutionary", "ars", "ara", "dobi", "llrc:paper"]
Row = dict[str, Any]


def contest_of(
    args: argparse.Namespace, model: str, metric: str, seed: int, methods: list[str], rates: list[float], work: Path
) -> list[Row]:
    text = args.data / "text"
    own = ("stdlib:train", "stdlib:held-out") if model == "bundled" else stories(args.data, args.work)
    return hold_contest(
        None if model == "bundled" else args.data / "models" / model,
        rates,
        [own[1], *(str(text / name) for name in args.off_domain)],
        work,
        allocations=methods,
        decompositions=[metric],
        calibration=own[0],
        samples=args.samples,
        judge_samples=args.judge_samples,
        length=LENGTH,
        seed=seed,
        neurons="all",
    )


def seconds_alone(args: argparse.Namespace, model: str) -> str:
    """What a method takes by itself, nothing found ready, one after the other in this run."""
    lines = [
        f"#### Seconds of one run at rate {TIMED_RATE}, each method alone\n",
        "| method | seconds | / kl-knapsack |",
        "|---|---|---|",
    ]
    first = 0.0
    for method in ("kl-knapsack", "kl-knapsack points=3", RANKS_ALONE, FULL):
        with tempfile.TemporaryDirectory() as work:
            (row,) = contest_of(args, model, args.metrics[0], args.seeds[0], [method], [TIMED_RATE], Path(work))
        seconds = row["effort"]["seconds"]
        first = first or seconds
        lines.append(f"| {method} | {seconds:.1f} | {seconds / first:.1f} |")
    return "\n".join(lines) + "\n"


def method_of(row: Row) -> str:
    return str(row["method"]).rpartition(" on ")[0]


def cells(runs: Iterable[list[Row]], pick: Any) -> dict[tuple[str, float], list[float]]:
    """(method, rate) -> the picked figure of each seed."""
    found: dict[tuple[str, float], list[float]] = {}
    for rows in runs:
        for row in rows:
            found.setdefault((method_of(row), row["rate"]), []).append(pick(row))
    return found


def table(title: str, figures: dict[tuple[str, float], list[float]], rates: list[float]) -> str:
    """A line per method: mean over the seeds, and half their range. The least mean of each rate is bold."""
    methods = list(dict.fromkeys(method for method, _ in figures))
    least = {rate: min(statistics.mean(v) for (_, r), v in figures.items() if r == rate) for rate in rates}
    lines = [f"#### {title}\n", "| method | " + " | ".join(map(str, rates)) + " |", "|---|" + "---|" * len(rates)]
    for method in methods:
        shown = []
        for rate in rates:
            values = figures.get((method, rate), [])
            text = f"{statistics.mean(values):.4f}" if values else ""
            if values and statistics.mean(values) == least[rate]:
                text = f"**{text}**"
            if len(values) > 1:
                text += f" ±{(max(values) - min(values)) / 2:.4f}"
            shown.append(text)
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def verdict(figures: dict[tuple[str, float], list[float]], rates: list[float]) -> str:
    """llrc against the best method that trains nothing: clear where every seed of the one is below every seed of the other."""
    lines = ["| rate | best that trains nothing | llrc's ranks | and values | clear |", "|---|---|---|---|---|"]
    for rate in rates:
        others = {m: v for (m, r), v in figures.items() if r == rate and m.split()[0] not in TRAINING}
        best = min(others, key=lambda m: statistics.mean(others[m]))
        base, ours = statistics.mean(others[best]), figures[FULL, rate]
        alone, change = (statistics.mean(figures[m, rate]) / base - 1 for m in (RANKS_ALONE, FULL))
        clear = "yes" if max(ours) < min(others[best]) else "no"
        lines.append(f"| {rate} | {best}: {base:.4f} | {alone:+.1%} | {change:+.1%} | {clear} |")
    return "\n".join(lines) + "\n"


def of_model(args: argparse.Namespace, model: str) -> str:
    """All tables of one model."""
    parts = [f"## {model}\n"]
    for metric in args.metrics:
        seeds = args.seeds if metric == args.metrics[0] else args.seeds[: args.further_seeds]
        where = {seed: args.work / f"{model}-{metric}-{seed}" for seed in seeds}
        runs = [contest_of(args, model, metric, seed, METHODS, args.rates, work) for seed, work in where.items()]
        if metric == args.metrics[0] and model in args.slow:
            work = args.work / f"{model}-{metric}-{seeds[0]}-slow"
            runs.append(contest_of(args, model, metric, seeds[0], SLOW, args.rates, work))
        figures = cells(runs, lambda row: row["kl"])
        parts += [f"### {metric}\n", table("KL to the dense model on held-out text, nats per token", figures, args.rates)]
        parts += [verdict(figures, args.rates)]
        if metric == args.metrics[0]:
            for text in list(runs[0][0]["texts"])[1:]:
                off = cells(runs, lambda row, text=text: row["texts"][text]["kl"])
                parts.append(table(f"The same ranks judged on {Path(text).stem}", off, args.rates))
            tokens = cells(runs, lambda row: sum(row["effort"][f"{way}_tokens"] for way in ("forward", "backward")) / 1e6)
            parts.append(table("Million tokens through the model, forward and backward", tokens, args.rates).replace("**", ""))
            parts.append(seconds_alone(args, model))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["babyllama-tok105", "stories260k", "bundled"])
    parser.add_argument("--metrics", nargs="+", default=["kronecker", "whitened"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--judge-samples", type=int, default=48)
    parser.add_argument("--off-domain", nargs="+", default=["wiki.test.raw", "c4.utf8"])
    parser.add_argument("--further-seeds", type=int, default=3, help="seeds of every metric after the first")
    parser.add_argument("--slow", nargs="*", default=[], help="models on which the slow methods run as well")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-allocators")
    args = parser.parse_args()
    text = "\n".join(of_model(args, model) for model in args.models)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "allocators.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
