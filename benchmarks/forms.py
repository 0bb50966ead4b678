"""What matrices may become: pairs of factors, pivoted ones, and pivoted ones beside MLPs with fewer neurons, at the same
number of parameters.

    python benchmarks/forms.py [--models bundled MGM-9M SmolLM2-135M-Instruct] [--rates 0.1 0.2 0.3 0.4]
                               [--allocation llrc:quick] [--samples 64] [--judge-samples 16]

Calibrated and judged as in `real_models.py`; the bundled model on the standard library's training split, judged on its
held-out one, on WikiText-2 and on C4. How fast each is, `speed.py` times. All that is found is kept in
benchmarks/results/forms.json and printed to forms.md; what was computed is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from main_job import HERE
from real_models import LENGTH, cell, machine, quantized_of, texts_of
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise import bundled
from rankwise.contest import hold_contest
from rankwise.layers.matrices import find_matrices

RESULTS = HERE / "results" / "forms.json"
WAYS: dict[str, dict[str, Any]] = {
    "pairs of factors": {"form": "pair", "neurons": "all"},
    "pivoted": {"form": "pivoted", "neurons": "all"},
    "pivoted, and MLPs with fewer neurons": {"form": "pivoted", "neurons": "fewer"},
}


def source_of(model: str, args: argparse.Namespace) -> tuple[Path, str, dict[str, str]]:
    """The model's folder, the text to calibrate on, and by name those to judge on."""
    if model == "bundled":
        text = {name: str(args.data / "text" / file) for name, file in (("WikiText-2", "wiki.test.raw"), ("C4", "c4.utf8"))}
        return Path(bundled.MODEL), "stdlib:train", {"Python": "stdlib:held-out"} | text
    folder = args.real_models / model
    texts = texts_of(folder, args.data, args.work / model)
    return folder, texts.pop("c4", "self"), texts


def costs_of(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """KL of every way at every rate on every text."""
    folder, calibration, texts = source_of(model, args)
    rows = []
    for way in args.ways:
        found = hold_contest(
            folder,
            args.rates,
            list(texts.values()),
            args.work / model / "forms",
            allocations=[args.allocation],
            calibration=calibration,
            judge_samples=args.judge_samples,
            samples=args.samples,
            length=LENGTH,
            dtype="float32",
            **WAYS[way],
        )
        for row in found:
            figures = {name: row["texts"][path] for name, path in texts.items()}
            rows.append(
                {
                    "way": way,
                    "allocation": args.allocation,
                    "rate": row["rate"],
                    "tokens": next(iter(figures.values()))["tokens"],
                    "machine": machine(),
                    "kl": {name: found["kl"] for name, found in figures.items()},
                    "perplexity": {name: found["perplexity"] for name, found in figures.items()},
                }
            )
    return rows


def dense_of(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Dense int8 and int4 on the same windows, and the numbers in the matrices that rates are of."""
    folder, _, texts = source_of(model, args)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    compressible = sum(shape.dense for shape in find_matrices(empty)[0].values())
    return quantized_of(folder, texts, args.judge_samples) | {"compressible": compressible}


def tables(results: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, found in results.items():
        for text in found["costs"][0]["kl"]:
            lines += _costs(model, text, found["costs"], found["quantized"])
    return "\n".join(lines) + "\n"


def _costs(model: str, text: str, rows: list[dict[str, Any]], quantized: dict[str, Any]) -> list[str]:
    rates = sorted({row["rate"] for row in rows})
    dense = quantized["dense"]["bytes"]
    size = {rate: (dense - 2 * rate * quantized["compressible"]) / 1e6 for rate in rates}
    beside = {bits: quantized[bits] for bits in ("int8", "int4")}
    of_bits = (f"{bits} {q['bytes'] / 1e6:.1f} MB {cell(q['texts'][text])}" for bits, q in beside.items())
    lines = [
        f"### {model}, judged on {text}: KL in nats per token (perplexity)\n",
        f"{rows[0]['tokens']:,} tokens. Dense {dense / 1e6:.1f} MB in bfloat16, {', '.join(of_bits)}.\n",
        "| | " + " | ".join(f"rate {rate:g}: {size[rate]:.1f} MB" for rate in rates) + " | on |",
        "|---|" + "---|" * len(rates) + "---|",
    ]
    for way, allocation in dict.fromkeys((row["way"], row["allocation"]) for row in rows):
        own = {row["rate"]: row for row in rows if (row["way"], row["allocation"]) == (way, allocation)}
        cells = [cell({key: own[r][key][text] for key in ("kl", "perplexity")}) if r in own else "not run" for r in rates]
        machines = ", ".join(dict.fromkeys(row["machine"] for row in own.values()))
        lines.append(f"| {way}, {allocation} | {' | '.join(cells)} | {machines} |")
    return [*lines, ""]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both, the newer where both have one, in order."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["allocation"], [*WAYS].index(row["way"]), row["rate"]

    rows = {place(row): row for row in [*old, *new]}
    return [rows[at] for at in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", "MGM-9M", "SmolLM2-135M-Instruct"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--allocation", default="llrc:quick")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judge-samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-forms")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    torch.set_num_threads(args.threads)
    for model in args.models:
        own = results.setdefault(model, {})
        if "quantized" not in own:
            own["quantized"] = dense_of(model, args)
        own["costs"] = merged(own.get("costs", []), costs_of(model, args))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
