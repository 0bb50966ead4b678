"""A contest's results as a table on the terminal and as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rankwise.errors import RankwiseError

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
            table.add_row(label, *(f"{kl[r]:.4f}" if r in kl else "" for r in rates), f"{seconds:.0f}", f"{tokens / 1e6:.1f} M")
        Console(soft_wrap=True).print(table)


def by_method(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, by its label, in order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault(row["method"], []).append(row)
    return groups


def plot_contest(results: Results, path: Path) -> None:
    """KL against rate, a line per method; and, for the best method at the middle rate, what each matrix keeps.

    Raises `RankwiseError` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RankwiseError("pictures need matplotlib: pip install 'rankwise[plot]'") from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    lines, heat = figure.subplots(1, 2, width_ratios=(3, 2))
    for label, rows in by_method(results).items():
        rows = sorted(rows, key=lambda r: r["rate"])
        lines.plot([r["rate"] for r in rows], [r["kl"] for r in rows], marker="o", markersize=4, label=label)
    lines.set(xlabel="rate (fraction of parameters removed)", ylabel="KL(original || compressed), nats per token", yscale="log")
    lines.grid(alpha=0.3)
    lines.legend(fontsize=8)
    rates = sorted({row["rate"] for row in results})
    best = min((r for r in results if r["rate"] == rates[len(rates) // 2]), key=lambda r: r["kl"])
    _heat_map(heat, best)
    figure.colorbar(heat.images[0], ax=heat, label="fraction of parameters kept")
    figure.savefig(path, dpi=120)


def _heat_map(axes: Any, row: Mapping[str, Any]) -> None:
    """Layers down, matrix types across; a cell's colour is the fraction of its parameters kept, its text the rank."""
    places = {}
    for name in row["ranks"]:
        number = re.search(r"\.(\d+)\.", name)
        places[int(number[1]) if number else 0, re.sub(r"^.*?\.\d+\.", "", name)] = name
    layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))
    kept = [[row["kept"].get(places.get((layer, kind)), float("nan")) for kind in kinds] for layer in layers]
    axes.imshow(kept, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for (layer, kind), name in places.items():
        rank, colour = row["ranks"][name], "black" if row["kept"][name] > 0.6 else "white"
        text = "dense" if rank is None else rank
        axes.text(kinds.index(kind), layers.index(layer), text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(kinds)), [kind.split(".")[-1] for kind in kinds], rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set(ylabel="layer", title=f"ranks: {row['method']}, rate {row['rate']}")
