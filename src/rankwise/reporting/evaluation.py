"""An evaluation as tables on the terminal: every figure with its interval, every accuracy with what guessing gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from rankwise.plain import shown
from rankwise.reporting.terminal import plain_console, print_report

Format = Callable[[float], str]


def print_evaluation(report: Mapping[str, Any]) -> None:
    """The headline, then every text, the tasks, the hidden states and the generations."""
    print_report(report)
    console = plain_console()
    console.print(_texts(report["texts"]))
    if report.get("tasks"):
        console.print(_tasks(report["tasks"]))
        if blind := blind_tasks(report["tasks"]):
            console.print(f"the original itself is not above chance, so these say nothing of the compression: {', '.join(blind)}")
    behaviour = Table("", "original", "compressed", box=box.SIMPLE_HEAD)
    for name, measure in ((k, v) for k, v in report["hidden_states"].items() if k != "windows"):
        cells = (_with(measure[kind], measure["intervals"][kind], "{:.3f}".format) for kind in ("reference", "compressed"))
        behaviour.add_row(f"{name.replace('_', ' ')} of the last hidden states", *cells)
    if written := report.get("generations"):
        for title, key, form in (
            (f"length of {len(written['samples'])} greedy continuations, at most {written['new_tokens']}", "tokens", "{:.1f}"),
            ("repeated 4-grams in them", "repetition", "{:.1%}"),
        ):
            behaviour.add_row(title, *(form.format(written[key][kind]) for kind in ("reference", "compressed")))
        behaviour.add_row("tokens before they part", "", f"{written['common_prefix']:.1f}")
    if behaviour.rows:
        console.print(behaviour)
    console.print("in brackets: 95 % intervals")


def _texts(texts: Mapping[str, Any]) -> Table:
    table = Table(
        Column("text", overflow="fold"), "perplexity, original", "compressed", "ratio", "KL", "flips", box=box.SIMPLE_HEAD
    )
    gap = len(texts) > 1
    if gap:
        table.add_column("KL above the first's")
    for name, row in texts.items():
        intervals = row["intervals"]
        cells = [
            "" if row[key] is None else _with(row[key], intervals[key], form.format)
            for key, form in (
                ("reference_perplexity", "{:.3f}"),
                ("perplexity", "{:.3f}"),
                ("perplexity_ratio", "{:.3f}"),
                ("kl", "{:.4f}"),
                ("flips", "{:.1%}"),
            )
        ]
        if gap:
            cells.append("" if row["gap"] is None else _with(row["gap"]["kl"], row["gap"]["intervals"]["kl"], "{:+.4f}".format))
        table.add_row(name, *cells)
    return table


def _tasks(tasks: Mapping[str, Any]) -> Table:
    columns = (Column("task", overflow="fold"), "items", "metric", "chance", "original", "compressed", "difference", "flips", "p")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for name, task in tasks.items():
        chance = "" if task["chance"] is None else f"{task['chance']:.1%}"
        for metric, found in task["metrics"].items():
            cells = [
                _with(found[kind], found["intervals"][kind], form.format)
                for kind, form in (("reference", "{:.1%}"), ("compressed", "{:.1%}"), ("difference", "{:+.1%}"))
            ]
            p_value = "" if found["p_value"] is None else f"{found['p_value']:.3f}"
            table.add_row(name, f"{task['items']:,}", metric, chance, *cells, f"{found['flips']:.1%}", p_value)
        for metric, found in task["other"].items():
            table.add_row(
                name, f"{task['items']:,}", metric, "", *(shown(found[kind], "{:.4g}".format) for kind in found), "", "", ""
            )
    return table


def blind_tasks(tasks: Mapping[str, Any]) -> list[str]:
    """The tasks that say nothing: where the original itself is not above chance."""
    return [name for name, task in tasks.items() if task["metrics"] and not _above_chance(task)]


def _above_chance(task: Mapping[str, Any]) -> bool:
    """Whether the original is, in any metric; True where there is no chance level."""
    return any(m["above_chance"] is None or m["above_chance"]["reference"] for m in task["metrics"].values())


def _with(value: float, interval: list[float] | None, form: Format) -> str:
    figures = [shown(figure, form) for figure in (value, *(interval or ()))]
    return figures[0] if interval is None else f"{figures[0]}\n[{figures[1]}, {figures[2]}]"
