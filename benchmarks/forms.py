"""What matrices may become: pairs of factors, pivoted ones, and pivoted ones beside MLPs with fewer neurons, at the same
number of parameters.

    python benchmarks/forms.py [--models bundled MGM-9M SmolLM2-135M-Instruct] [--rates 0.1 0.2 0.3 0.4]
                               [--allocation llrc:quick] [--samples 64] [--judge-samples 16] [--speed]

Calibrated and judged as in `real_models.py`; the bundled model on the standard library's training split, judged on its
held-out one, on WikiText-2 and on C4. With --speed: the time of a prompt and of a token, of decoders of random weights.
All that is found is kept in benchmarks/results/forms.json and printed to forms.md; what was computed is kept in --work.
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
from speed import compress_at_random, decoder
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise import bundled
from rankwise.contest import hold_contest
from rankwise.layers.matrices import find_matrices
from rankwise.runtime.bench import Load, times
from rankwise.runtime.optimize import optimize
from rankwise.runtime.timing import ratio

RESULTS = HERE / "results" / "forms.json"
LAYERS, MULTIPLE = 4, 32  # of the decoders that are timed, and of their ranks and neurons
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


def speeds_of(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """How many times as fast as dense a decoder of random weights is in every way, optimised: its MLPs alone narrower in the last
    one, which then is a decoder like the dense one with fewer neurons."""
    rows = []
    for rate in args.rates:
        models = {"dense": decoder(size, LAYERS, torch.float32, "cpu")}
        for way in args.ways:
            small = decoder(size, LAYERS, torch.float32, "cpu")
            asked = WAYS[way]
            models[way] = optimize(narrow(small, rate) if asked["neurons"] == "fewer" else at_random(small, rate, asked["form"]))
        for phase, seconds in times(list(models.values()), Load(1, 512, 16), args.repeats).items():
            dense, *others = seconds
            for way, own in zip(args.ways, others, strict=True):
                ideal = ideal_of(models["dense"], models[way], phase)
                rows.append({"way": way, "rate": rate, "phase": phase, "speedup": ratio(dense, own), "ideal": ideal})
    return rows


def at_random(model: Any, rate: float, form: str) -> Any:
    return compress_at_random(model, rate, MULTIPLE, form)


def narrow(model: Any, rate: float) -> Any:
    """The decoder without so many of its matrices' numbers, all of them its MLPs'."""
    shapes = find_matrices(model)[0]
    gone = rate * sum(shape.dense for shape in shapes.values()) / sum(s.dense for name, s in shapes.items() if "mlp" in name)
    for layer in model.model.layers:
        size = round((1 - gone) * layer.mlp.down_proj.in_features / MULTIPLE) * MULTIPLE
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight, linear.out_features = nn.Parameter(linear.weight[:size].clone(), requires_grad=False), size
        down = layer.mlp.down_proj
        down.weight, down.in_features = nn.Parameter(down.weight[:, :size].contiguous(), requires_grad=False), size
    return model


def ideal_of(dense: Any, small: Any, phase: str) -> float:
    """Dense over compressed numbers that are multiplied with, the output head among them where one token is decoded."""
    head = dense.lm_head.weight.numel() * (phase == "decode")

    def numbers(model: Any) -> int:
        return head + sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    return numbers(dense) / numbers(small)


def tables(results: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, found in results.items():
        for text in found["costs"][0]["kl"] if "costs" in found else []:
            lines += _costs(model, text, found["costs"], found["quantized"])
        if "speeds" in found:
            lines += _speeds(model, found["speeds"])
    return "\n".join(lines) + "\n"


def _costs(model: str, text: str, rows: list[dict[str, Any]], quantized: dict[str, Any]) -> list[str]:
    rates = sorted({row["rate"] for row in rows})
    dense = quantized["dense"]["bytes"]
    size = {rate: (dense - 2 * rate * quantized["compressible"]) / 1e6 for rate in rates}
    beside = {bits: quantized[bits] for bits in ("int8", "int4")}
    of_bits = (f"{bits} {q['bytes'] / 1e6:.1f} MB {cell(q['texts'][text])}" for bits, q in beside.items())
    lines = [
        f"### {model}, judged on {text}: KL in nats per token (perplexity)\n",
        f"{rows[0]['machine']}, {rows[0]['tokens']:,} tokens. Dense {dense / 1e6:.1f} MB in bfloat16, {', '.join(of_bits)}.\n",
        "| | " + " | ".join(f"rate {rate:g}: {size[rate]:.1f} MB" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for way, allocation in dict.fromkeys((row["way"], row["allocation"]) for row in rows):
        own = {row["rate"]: row for row in rows if (row["way"], row["allocation"]) == (way, allocation)}
        cells = [cell({key: own[r][key][text] for key in ("kl", "perplexity")}) if r in own else "not run" for r in rates]
        lines.append(f"| {way}, {allocation} | {' | '.join(cells)} |")
    return [*lines, ""]


def _speeds(size: str, rows: list[dict[str, Any]]) -> list[str]:
    rates = sorted({row["rate"] for row in rows})
    lines = [
        f"### A decoder of {LAYERS} layers of Llama {size}'s shapes, random weights: how many times as fast as dense\n",
        f"{machine()}, float32, a prompt of 512 tokens and 16 after it; in brackets the part of the ideal, which is that of the "
        "numbers multiplied with.\n",
        "| | phase | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for way, phase in dict.fromkeys((row["way"], row["phase"]) for row in rows):
        own = {row["rate"]: row for row in rows if (row["way"], row["phase"]) == (way, phase)}
        cells = [f"{own[r]['speedup']:.2f} ({own[r]['speedup'] / own[r]['ideal']:.0%})" for r in rates]
        lines.append(f"| {way.replace('pivoted, and ', '')} | {phase} | {' | '.join(cells)} |")
    return [*lines, ""]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both, the newer where both have one, in order."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row.get("allocation", ""), [*WAYS].index(row["way"]), row.get("phase", ""), row["rate"]

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
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-forms")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    torch.set_num_threads(args.threads)
    kind, of, models = ("speeds", speeds_of, ["1B"]) if args.speed else ("costs", costs_of, args.models)
    for model in models:
        own = results.setdefault(model, {})
        if not args.speed and "quantized" not in own:
            own["quantized"] = dense_of(model, args)
        own[kind] = merged(own.get(kind, []), of(model, args))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
