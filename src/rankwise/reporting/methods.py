"""Every method there is: its name here and in its paper, the metric it works in, and when to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from rankwise.allocation.allocator import ALLOCATORS, PAPERS, spelling
from rankwise.decomposition.metric import METRICS
from rankwise.refinement.refinement import REFINEMENTS
from rankwise.reporting.terminal import plain_console

WHEN: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "when.yaml").read_text(encoding="utf-8"))


def all_methods() -> dict[str, Any]:
    """The allocations, by NAME or NAME:PRESET, the decompositions and the refinements, as plain values."""
    papers = {name: [paper for paper, own in PAPERS.items() if own == name] for name in ALLOCATORS}
    return {
        "allocations": [
            {"name": full, "papers": papers[name] if preset == "default" else [], "decomposition": cls.decomposition}
            | {"when": WHEN["allocation"][full]}
            for name, presets in ALLOCATORS.items()
            for preset, cls in presets.items()
            for full in [spelling(name, preset)]
        ],
        "decompositions": [{"name": name, "when": WHEN["decomposition"][name]} for name in METRICS],
        "refinements": [{"name": name, "when": WHEN["refinement"][name]} for name in REFINEMENTS],
    }


def print_methods(found: dict[str, Any]) -> None:
    """Three tables: what --allocation takes, what --decomposition takes, and what --refine takes."""
    console = plain_console()
    table = Table("--allocation", "in papers", "on", "when", box=box.SIMPLE_HEAD)
    for row in found["allocations"]:
        table.add_row(row["name"], ", ".join(row["papers"]), row["decomposition"], row["when"])
    console.print(table)
    for option, rows in (("--decomposition", found["decompositions"]), ("--refine", found["refinements"])):
        table = Table(option, "when", box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(row["name"], row["when"])
        console.print(table)
