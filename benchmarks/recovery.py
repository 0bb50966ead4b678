"""What training wins back of what compression has lost, at the same ranks and bytes.

    python benchmarks/recovery.py [--models SmolLM2-135M-Instruct MGM-9M bundled] [--rates 0.2 0.4] [--bits 3 2] [--samples 64]
                                  [--refine-samples 256] [--judge-samples 16]
                                  [--refine blocks "blocks, distil" distil]

Every model is compressed as by default, or every matrix written in so many bits, on `--samples` windows of text, then
refined on `--refine-samples` others of the same source: C4; for MGM, of which there is no text, what it writes itself; for
the bundled model its own documentation. A chain of refinements comes after its beginning in the list. All are judged on
texts of that source and of others (see real_models.py). The share is that of the KL which is won back. All that is found is
kept in benchmarks/results/recovery.json and printed to recovery.md; what was computed is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from main_job import HERE
from real_models import LENGTH, costs, judges_of, load, machine, texts_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise
from rankwise import bundled

RESULTS = HERE / "results" / "recovery.json"
BUNDLED = "bundled"
SEED = 2  # of the text that is trained on: statistics take 0, and what MGM is judged on is written with 1


def opened(name: str, args: argparse.Namespace) -> tuple[Any, dict[str, str], str]:
    """The model's folder, the texts to judge on, and the one to calibrate and to train on."""
    if name == BUNDLED:
        return bundled.MODEL, {"its documentation": "stdlib:held-out"}, "stdlib:train"
    texts = texts_of(args.real_models / name, args.data, args.work / name)
    return args.real_models / name, texts, texts.pop("c4", "self")


def contest_of(name: str, target: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The model compressed to the target, a rate or bits, and the same after each refinement."""
    folder, texts, text = opened(name, args)
    asked: dict[str, Any] = {"calibration": text, "length": LENGTH, "dtype": "float32"}
    [size] = target.values()
    small = args.work / f"{name}-{size:g}-{args.samples}"
    if not small.exists():
        rankwise.compress(folder, output=small, resume=True, samples=args.samples, **target, **asked)
    found = {"": (small, 0.0)}
    for refine in args.refine:
        before, _, last = refine.rpartition(", ")  # a chain goes on from what is there of it
        start, seconds = found[before]
        output = args.work / f"{small.name}-{refine}-{args.refine_samples}"
        if not output.exists():
            rankwise.refine(
                start, folder, refine=last, samples=args.refine_samples, seed=SEED, output=output, resume=True, **asked
            )
        seconds = json.loads((output / "report.json").read_text())["seconds"]["refinement"]
        found[refine] = output, seconds
        print(f"{name} {size:g} {refine}: {seconds:.0f} s", flush=True)
    original = load(folder)
    judges = judges_of(original, AutoTokenizer.from_pretrained(folder), texts, args.judge_samples)
    rows = []
    for refine, (path, seconds) in found.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval().to(original.device)
        tokens = args.refine_samples * LENGTH if refine else 0
        row = {**target, "refine": refine, "tokens": tokens, "seconds": seconds, "machine": machine()}
        rows.append(row | {"texts": costs(original, model, judges)})
    return rows


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, rows in results.items():
        texts = list(rows[0]["texts"])
        dense = ", ".join(f"{text} {rows[0]['texts'][text]['reference_perplexity']:.1f}" for text in texts)
        machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
        lines += [
            f"### {model}: KL in nats per token (perplexity), and the share won back; dense {dense}\n",
            f"{machines}; {rows[0]['texts'][texts[0]]['tokens']:,} tokens of each text.\n",
            "| rate or bits | refined by | tokens | seconds | " + " | ".join(texts) + " |",
            "|---|---|---|---|" + "---|" * len(texts),
        ]
        before: dict[str, Any] = {}
        for row in rows:
            before = before if row["refine"] else row["texts"]
            cells = []
            for text in texts:
                now = row["texts"][text]
                share = f", {1 - now['kl'] / before[text]['kl']:.0%}" if row["refine"] else ""
                cells.append(f"{now['kl']:.4f} ({now['perplexity']:.1f}){share}")
            size = f"{row['bits']} bits" if "bits" in row else row["rate"]
            made = f"| {size} | {row['refine'] or 'nothing'} | {row['tokens']:,} | {row['seconds']:.0f} | "
            lines.append(made + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[float, float, int, str]:
    """Where a row stands: rates first, then bits from the most down."""
    return row.get("rate", 1), -row.get("bits", 0), row["tokens"], row["refine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M-Instruct", "MGM-9M", BUNDLED])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.2, 0.4])
    parser.add_argument("--bits", nargs="*", type=int, default=[3, 2])
    parser.add_argument("--refine", nargs="+", default=["blocks", "blocks, distil", "distil"])
    parser.add_argument("--samples", type=int, default=64, help="windows to compress with")
    parser.add_argument("--refine-samples", type=int, default=256)
    parser.add_argument("--judge-samples", type=int, default=16)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-recovery")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in args.models:
        for target in [*({"rate": rate} for rate in args.rates), *({"bits": bits} for bits in args.bits)]:
            new = contest_of(model, target, args)
            same = {_place(row) for row in new}
            old = [row for row in results.get(model, []) if _place(row) not in same]
            results[model] = sorted([*old, *new], key=_place)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
