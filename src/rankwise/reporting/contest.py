"""A contest's results as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from rankwise.plain import shown
from rankwise.reporting.terminal import plain_console

Results = Sequence[Mapping[str, Any]]


def print_contest(results: Results) -> None:
    """A table for each text, one line per method: KL at each rate, and what the method took in all."""
    rates = sorted({row["rate"] for row in results})
    for text in results[0]["texts"]:
        title = f"KL(original || compressed) on {text}"
        table = Table(title, *(f"rate {rate}" for rate in rates), "seconds", "tokens", box=box.SIMPLE_HEAD)
        for label, rows in by_method(results).items():
            kl = {row["rate"]: row["texts"][text]["kl"] for row in rows}
            seconds = sum(row["effort"]["seconds"] for row in rows)
            tokens = sum(row["effort"]["forward_tokens"] + row["effort"]["backward_tokens"] for row in rows)
            table.add_row(
                label,
                *(shown(kl[r], "{:.4f}".format) if r in kl else "" for r in rates),
                f"{seconds:.0f}",
                f"{tokens / 1e6:.1f} M",
            )
        plain_console().print(table)


def by_method(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, by its label, in order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault(row["method"], []).append(row)
    return groups
