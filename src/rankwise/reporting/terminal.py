"""Reports as tables on the terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rankwise.plain import shown

MOST_STEPS = 12  # of an allocation, that are told one by one


def plain_console() -> Console:
    """Standard output, which may be as wide as it likes where it is no terminal."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def print_report(report: Mapping[str, Any]) -> None:
    """Size and quality of the original and the compressed model, side by side."""
    console = plain_console()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "original", "compressed"):
        table.add_column(column, justify="left" if not column else "right")
    titles = {"linear": "parameters, compressible matrices", "model": "parameters, whole model"}
    for scope, title in titles.items():
        row = report["parameters"][scope]
        removed = report["achieved_rate"][scope]
        table.add_row(title, f"{row['reference']:,}", f"{row['compressed']:,}" + (f" (-{removed:.1%})" if removed else ""))
    row = report["bytes"]["model"]
    table.add_row("bytes of weights", f"{row['reference']:,}", f"{row['compressed']:,}")
    if report["perplexity"] is not None:
        table.add_row("perplexity", *(shown(report[name], "{:.3f}".format) for name in ("reference_perplexity", "perplexity")))
    table.add_row("KL(original || compressed), nats per token", "", shown(report["kl"], "{:.5f}".format))
    if report["agreement"] is not None:
        table.add_row("same most likely token", "", f"{report['agreement']:.2%}")
    console.print(table)
    where = f"on {report['text']}" if "text" in report else "on held-out calibration text"
    console.print(f"measured {where}: {report['windows']:,} windows, {report['tokens']:,} predicted tokens")
    if report.get("conversations"):
        whose = "it holds" if "text" in report else "the calibration text holds"
        console.print(f"{whose} {report['conversations']:,} conversations, in the model's chat template")
    if "before_refinement" in report:
        console.print(f"before refinement the KL was {shown(report['before_refinement']['kl'], '{:.5f}'.format)}")
    for note in report.get("notes", []):
        console.print(note)
    if "predicted_speedup" in report:
        console.print(
            f"decodes {report['predicted_speedup']:.2f} times as fast by this machine's table: check with rankwise bench"
        )
    if "seconds" in report:
        memory = "".join(f", {size / 2**20:,.0f} MiB of {kind} memory" for kind, size in report["peak_memory_bytes"].items())
        console.print(f"took {sum(report['seconds'].values()):.0f} s{memory} at most")
    for key, text in {"kl": "the selection text", "other_kl": "the other text"}.items():
        records = [record for record in report.get("history", []) if key in record]
        steps = [f"{record['step']} {shown(record[key], '{:.5f}'.format)}" for record in records]
        if 0 < len(steps) <= MOST_STEPS:
            console.print(f"KL on {text}, step by step: {', '.join(steps)}")
    dense = [name for name, rank in report["ranks"].items() if rank is None]
    widths = Counter(report.get("bits", {}).values())
    if len(dense) < len(report["ranks"]) or not widths:
        console.print(f"{len(report['ranks']) - len(dense)} matrices of low rank, {len(dense)} best left dense")
    if report.get("neurons"):
        kept, before = (sum(pair[i] for pair in report["neurons"].values()) for i in (0, 1))
        console.print(f"{len(report['neurons'])} MLPs keep {kept:,} of their {before:,} hidden neurons")
    if widths:
        console.print(
            "bits a number: " + ", ".join(f"{widths[bits]} matrices of {bits}" for bits in sorted(widths, reverse=True))
        )
    for reason, names in _by_reason(report.get("left_dense", {})).items():
        console.print(f"not considered, {reason}: {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}")


def _by_reason(left_dense: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in left_dense.items():
        groups.setdefault(reason, []).append(name)
    return groups


def print_ranks(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per matrix."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("matrix", no_wrap=True)
    for column in ("shape", "rank", "bits", "break-even", "parameters", "kept"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["matrix"],
            f"{row['out_features']} x {row['in_features']}",
            "dense" if row["rank"] is None else str(row["rank"]),
            "" if row["bits"] is None else str(row["bits"]),
            f"{row['break_even_rank']:.0f}",
            f"{row['parameters']:,}",
            f"{row['parameters'] / row['dense_parameters']:.0%}",
        )
    after, before = (sum(row[k] for row in rows) for k in ("parameters", "dense_parameters"))
    plain_console().print(table, f"{after:,} of {before:,} parameters kept ({after / before:.1%})")


def print_speed(report: Mapping[str, Any]) -> None:
    """Tokens per second of each phase and batch size, and peak memory."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tokens per second", no_wrap=True)
    compared = report["reference"] is not None
    for column in ["model", "original", "speed-up", "ideal", "of ideal"] if compared else ["model"]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["speed"]:
        cells = [f"{speed:,.1f}" for speed in row["tokens_per_second"].values()]
        if compared:
            cells += [f"{row['speedup']:.2f}", f"{row['ideal']:.2f}", f"{row['of_ideal']:.0%}"]
        table.add_row(f"{row['phase']}, batch {row['batch']}", *cells)
    console = plain_console()
    console.print(table)
    for role, name in (("compressed", "model"), ("reference", "original")):
        peaks = [
            f"{size / 2**20:,.0f} MiB of {kind} memory at batch {batch}"
            for batch, sizes in report["peak_memory_bytes"].get(role, {}).items()
            for kind, size in sizes.items()
        ]
        if peaks:
            console.print(f"{name}: {', '.join(peaks)}")
    console.print(
        f"{report['dtype']} on {report['device']}, {report['threads']} threads{', compiled' * report['compiled']}; prompt "
        f"{report['prompt']}, then {report['new_tokens']} tokens one at a time; medians of {report['repeats']} runs in turn"
    )
