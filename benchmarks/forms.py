"""What matrices may become: pairs of factors, pivoted ones, and pivoted ones beside MLPs with fewer neurons, at the same
number of parameters.

    python benchmarks/forms.py [--models bundled MGM-9M SmolLM2-135M-Instruct] [--rates 0.1 0.2 0.3 0.4]
                               [--allocation llrc:quick] [--samples 64] [--judge-samples 16] [--speed]

Calibrated and judged as in `real_models.py`; the bundled model on the standard library's training split, judged on its
held-out one, on WikiText-2 and on C4. With --speed: a prompt's and a token's time at --rates, in turn with the dense model's.
All that is found is kept in benchmarks/results/forms.json and printed to forms.md; what was computed is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from main_job import HERE
from real_models import LENGTH, load, machine, texts_of
from transformers import AutoTokenizer

from rankwise import bench, bundled, compress
from rankwise.contest import hold_contest

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
                    "rate": row["rate"],
                    "tokens": next(iter(figures.values()))["tokens"],
                    "machine": machine(),
                    "kl": {name: found["kl"] for name, found in figures.items()},
                    "perplexity": {name: found["perplexity"] for name, found in figures.items()},
                }
            )
    return rows


def speeds_of(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed-ups over the dense model of one prompt and of decoding, and of what is ideal."""
    folder, calibration, _ = source_of(model, args)
    dense = args.work / model / "dense"
    load(folder).save_pretrained(dense)
    AutoTokenizer.from_pretrained(folder).save_pretrained(dense)
    rows = []
    for way in args.ways:
        for rate in args.rates:
            output = args.work / model / f"{WAYS[way]['form']}-{WAYS[way]['neurons']}-{rate}"
            asked = {"samples": args.samples, "length": LENGTH, "dtype": "float32", "allocation": args.allocation}
            compress(dense, rate, calibration=calibration, output=output, overwrite=True, **WAYS[way], **asked)
            timed = bench(output, dense, batches=(1,), prompt=256, new_tokens=32, threads=1, repeats=9)["speed"]
            rows += [{"way": way, "rate": rate, **row} for row in timed]
    return rows


def tables(results: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, found in results.items():
        for text in found["costs"][0]["kl"] if "costs" in found else []:
            lines += _costs(model, text, found["costs"])
        if "speeds" in found:
            lines += _speeds(model, found["speeds"])
    return "\n".join(lines) + "\n"


def _costs(model: str, text: str, rows: list[dict[str, Any]]) -> list[str]:
    rates = sorted({row["rate"] for row in rows})
    lines = [
        f"### {model}, judged on {text}: KL in nats per token (perplexity)\n",
        f"{rows[0]['machine']}, {rows[0]['tokens']:,} tokens.\n",
        "| | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = {row["rate"]: row for row in rows if row["way"] == way}
        cells = [f"{own[r]['kl'][text]:.4f} ({own[r]['perplexity'][text]:.2f})" if r in own else "not run" for r in rates]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def _speeds(model: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"### {model}: how many times as fast as dense, float32, one thread; a prompt of 256 tokens, and tokens after it\n",
        "| | rate | phase | speed-up | ideal | of ideal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['rate']:g} | {row['phase']} | {row['speedup']:.2f} | {row['ideal']:.2f} | {row['of_ideal']:.0%} |"
        for row in rows
    ]
    return [*lines, ""]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both, the newer where both have one, in the order of ways and rates."""
    rows = {(row["way"], row["rate"], row.get("phase", "")): row for row in [*old, *new]}
    return sorted(rows.values(), key=lambda row: ([*WAYS].index(row["way"]), row["rate"], row.get("phase", "")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", "MGM-9M", "SmolLM2-135M-Instruct"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--allocation", default="llrc:quick")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judge-samples", type=int, default=16)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-forms")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kind, of = ("speeds", speeds_of) if args.speed else ("costs", costs_of)
    for model in args.models:
        own = results.setdefault(model, {})
        own[kind] = merged(own.get(kind, []), of(model, args))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
