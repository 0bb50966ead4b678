"""Compress the bundled model at rate 0.2, by uniform SVD and with learned ranks, and judge both on text neither has seen."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from rankwise import bundled, compress, evaluate

RATE = 0.2
OUTPUT = Path("demo")
SAMPLES = 512  # half of the default: the demo is to be quick
METHODS = {"uniform ranks": "uniform", "learned ranks": "llrc"}


def main() -> None:
    console = Console()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    table = Table("", "parameters", "perplexity", "KL to dense", "same top token", box=box.SIMPLE_HEAD)
    for title, allocation in METHODS.items():
        folder = OUTPUT / title.replace(" ", "-")
        console.print(f"[bold]{title}[/bold], rate {RATE}")
        compress(rate=RATE, output=folder, allocation=allocation, samples=SAMPLES)
        report = evaluate(folder, bundled.MODEL, "stdlib:held-out")
        size = report["parameters"]["model"]
        if not table.rows:
            table.add_row("dense", f"{size['reference']:,}", f"{report['reference_perplexity']:.2f}", "", "")
        table.add_row(
            title, f"{size['compressed']:,}", f"{report['perplexity']:.2f}", f"{report['kl']:.4f}", f"{report['agreement']:.1%}"
        )
    console.print(table)
    console.print(
        f"Judged on {report['tokens']:,} tokens of the standard library that neither training nor calibration has seen.\n"
        f"The compressed model is in {folder}: import rankwise, then AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )


if __name__ == "__main__":
    main()
