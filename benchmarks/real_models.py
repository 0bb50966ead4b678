"""What a rate costs on a really trained model of 135M parameters, and on one of 9M: every method beside dense int8 and int4
(round to nearest, groups of 64).

    python benchmarks/real_models.py [--models SmolLM2-135M-Instruct MGM-9M] [--calibrations c4 self] [--rates 0.1 0.2 0.3 0.4]
                                     [--forms pivoted pair] [--samples 64] [--judge-samples 64]
    python benchmarks/real_models.py --time quick default [--neurons all]

Calibration: a C4 sample, or text that the model writes itself (for MGM, of which there is no text, only that). Judged on windows
of WikiText-2's test split, of another part of C4, and of questions with their answers in the model's chat template; MGM on text
of its own, written with another seed. With --time: the whole of `rankwise compress --rate 0.2` at these efforts, each in its own
process, by its report. A GPU is used where there is one. Needs the data folder beside the repository (--data) and the models
(--real-models). All that is found is kept in benchmarks/results/real_models.json and printed to real_models.md; what was computed
is kept in --work.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from main_job import HERE
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.calibration.batches import batches_of
from rankwise.calibration.own_text import own_windows
from rankwise.calibration.signal import frozen, signal_of
from rankwise.calibration.tokens import Batch, windows_of
from rankwise.contest import hold_contest
from rankwise.evaluation.compare import compare
from rankwise.evaluation.protocols import read_judging_text
from rankwise.integration.checkpoint import resolve_device
from rankwise.layers.linear import dense_linear, is_linear, weight_of
from rankwise.layers.lowrank import FORMS, PairLinear

METHODS = {
    "uniform": "uniform ranks (SVD-LLM)",
    "zero-sum": "zero-sum",
    "kl-knapsack": "kl-knapsack, 1 point (LEMS)",
    "kl-knapsack points=3": "kl-knapsack, 3 points",
    "mask-fisher": "mask-fisher",
    "llrc value_steps=0": "llrc, ranks alone",
    "llrc": "**llrc**",
}
QUESTIONS = ("arc_easy_test", "arc_challenge_test", "piqa_val")
REPORTED = "seconds", "peak_memory_bytes", "kl", "perplexity", "reference_perplexity", "history"
RESULTS = HERE / "results" / "real_models.json"
GROUP, LENGTH = 64, 256


def texts_of(model: Path, data: Path, work: Path) -> dict[str, str]:
    """Every text by its name, as a file: "c4" is for calibration, the others to judge on."""
    work.mkdir(parents=True, exist_ok=True)
    if model.name == "MGM-9M":
        return {"its own text": str(own_text(model, work / "own.jsonl"))}
    text = (data / "text/c4.utf8").read_text(encoding="utf-8")
    at = text.index("\n", len(text) // 2)
    halves = {"c4": text[:at], "C4": text[at:]}
    for name, half in halves.items():
        (work / f"{name}-half.txt").write_text(half, encoding="utf-8")
    chats = work / "questions.jsonl"
    with chats.open("w") as file:
        for name in QUESTIONS:
            for line in (data / f"tasks/{name}.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                question = row["ctx"].removeprefix("Question: ").removesuffix("\nAnswer:")
                said = [("user", question), ("assistant", row["choices"][row["gold"]].strip())]
                file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    return {
        "WikiText-2": str(data / "text/wiki.test.raw"),
        "C4": str(work / "C4-half.txt"),
        "questions": str(chats),
        "c4": str(work / "c4-half.txt"),
    }


def own_text(folder: Path, file: Path) -> Path:
    """What the model writes with a seed that calibration does not use."""
    if not file.exists():
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        with frozen(model):
            windows = own_windows(model, LENGTH, 64, seed=1)
        rows = (json.dumps({"text": tokenizer.decode(window)}) for window in windows.tolist())
        file.write_text("\n".join(rows) + "\n")
    return file


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(resolve_device("auto"))


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"


def contest_of(
    folder: Path, calibration: str, form: Literal["pivoted", "pair"], args: argparse.Namespace, work: Path
) -> list[dict[str, Any]]:
    """Every method at every rate."""
    texts = texts_of(folder, args.data, work)
    rows = hold_contest(
        folder,
        args.rates,
        [path for name, path in texts.items() if name != "c4"],
        work / f"{calibration}-{args.effort}-{args.samples}",
        allocations=args.methods,
        calibration=texts["c4"] if calibration == "c4" else "self",
        judge_samples=args.judge_samples,
        effort=args.effort,
        samples=args.samples or None,
        dtype="float32",
        length=LENGTH,
        form=form,
        neurons="all",
    )
    names = {path: name for name, path in texts.items()}
    return [
        {
            "method": row["method"].rpartition(" on ")[0],
            "form": form,
            "machine": machine(),
            "rate": row["rate"],
            "seconds": row["effort"]["seconds"],
            "kept_parameters": row["kept_parameters"],
            "texts": {names[path]: _figures(found) for path, found in row["texts"].items()},
        }
        for row in rows
    ]


def with_bytes(rows: list[dict[str, Any]], dense: int) -> list[dict[str, Any]]:
    """The rows with what their models take in bfloat16, as the dense one of `dense` bytes does."""
    compressible = max((row["kept_parameters"] / (1 - row["rate"]) for row in rows), default=0)
    return [row | {"bytes": dense - 2 * (compressible - row["kept_parameters"])} for row in rows]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both, the newer where both have one, in the order of forms, methods and rates."""
    rows = {(row["form"], row["method"], row["rate"]): row for row in [*old, *new]}
    names = [*METHODS]
    return sorted(rows.values(), key=lambda r: ([*FORMS].index(r["form"]), names.index(r["method"]), r["rate"]))


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("kl", "perplexity", "reference_perplexity", "tokens")} | {
        "interval": found["intervals"]["kl"]
    }


def quantized_of(folder: Path, texts: dict[str, str], samples: int) -> dict[str, Any]:
    """Dense int8 and int4 on the same windows. Bytes are those held, what is not quantized at two a number."""
    original, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    found: dict[str, Any] = {"dense": {"bytes": 2 * original.num_parameters(), "parameters": original.num_parameters()}}
    judges = judges_of(original, tokenizer, texts, samples)
    for bits in (8, 4):
        model = load(folder)
        saved = sum(as_quantized(module, bits) for module in model.base_model.modules() if is_linear(module))
        found[f"int{bits}"] = {"bytes": found["dense"]["bytes"] - saved, "texts": costs(original, model, judges)}
    return found


def as_quantized(module: nn.Module, bits: int) -> int:
    """Round the weight as torchao does, in groups along each row with a scale of two bytes; the bytes saved. It is multiplied as
    floats, which gives the same numbers: a CPU without the units is slow in any other way."""
    weight = weight_of(module)
    group = math.gcd(GROUP, weight.shape[1])
    linear = dense_linear(weight.contiguous(), None, transposed=False)
    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group)))
    quantized: Any = linear.weight
    with torch.no_grad():
        weight.copy_(quantized.dequantize())
    return weight.numel() * 2 - weight.numel() * bits // 8 - weight.numel() // group * 2


def judges_of(original: Any, tokenizer: Any, texts: dict[str, str], samples: int) -> dict[str, list[Batch]]:
    """Windows of every text, the same at each run."""
    judges = {}
    for name, path in texts.items():
        text = read_judging_text(path)
        judges[name] = batches_of(original, windows_of(tokenizer, text.documents, LENGTH, samples, 0)[: text.windows])
    return judges


def costs(original: Any, model: Any, judges: dict[str, list[Batch]]) -> dict[str, Any]:
    """What the model costs on every text."""
    with frozen(original), frozen(model):
        before, after = (functools.partial(signal_of, each) for each in (original, model))
        return {name: _figures(compare(before, after, judge, causal=True).to_dict()) for name, judge in judges.items()}


def timed(folder: Path, effort: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole command, on a CPU with two threads, by its own report; and what its result costs on the texts."""
    command = [sys.executable, "-m", "rankwise", "compress", str(folder), "--rate", "0.2", "--effort", effort, "--json"]
    command += ["--output", str(work / f"timed-{effort}"), "--overwrite", *(["--neurons", args.neurons] if args.neurons else [])]
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / f"timed-{effort}.run", ignore_errors=True)  # what a killed run has found would be read
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "2"
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    return {key: report[key] for key in REPORTED} | {"texts": costs_of(folder, work / f"timed-{effort}", args, work)}


def costs_of(folder: Path, result: Path, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What a result folder costs on every text."""
    original, texts = load(folder), texts_of(folder, args.data, work)
    texts.pop("c4", None)
    judges = judges_of(original, AutoTokenizer.from_pretrained(folder), texts, args.judge_samples)
    return costs(original, load(result), judges)


def tables(results: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, found in results.items():
        dense = found.get("quantized", {}).get("dense")
        for key, rows in found.items():
            if key.startswith("calibrated on "):
                for text in rows[0]["texts"]:
                    lines += _table(model, key, text, rows, found["quantized"], dense)
        if "timed" in found:
            lines += _times(model, found["timed"])
    return "\n".join(lines) + "\n"


def _table(model: str, key: str, text: str, rows: list[dict[str, Any]], quantized: dict[str, Any], dense: Any) -> list[str]:
    rates = sorted({row["rate"] for row in rows})
    first = rows[0]["texts"][text]
    size = {row["rate"]: row["bytes"] for row in rows}
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    lines = [
        f"### {model}, {key}, judged on {text}: KL in nats per token (perplexity; dense {first['reference_perplexity']:.2f})\n",
        f"{machines}. {first['tokens']:,} tokens. Dense {dense['bytes'] / 1e6:.0f} MB in bfloat16, "
        + ", ".join(f"{w} {q['bytes'] / 1e6:.0f} MB {cell(q['texts'][text])}" for w, q in quantized.items() if w != "dense")
        + ".\n",
        "| method | " + " | ".join(f"rate {rate:g}: {size[rate] / 1e6:.0f} MB" for rate in rates) + " | seconds a rate |",
        "|---|" + "---|" * (len(rates) + 1),
    ]
    for form, method in dict.fromkeys((row["form"], row["method"]) for row in rows):
        own = {row["rate"]: row for row in rows if (row["form"], row["method"]) == (form, method)}
        cells = [cell(own[rate]["texts"][text]) if rate in own else "not run" for rate in rates]
        seconds = sum(row["seconds"] for row in own.values()) / len(own)
        name = METHODS.get(method, method) + ", pairs" * (form == PairLinear.form)
        on = f" on {', '.join(dict.fromkeys(row['machine'] for row in own.values()))}" if ", " in machines else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f}{on} |")
    return [*lines, ""]


def cell(found: dict[str, Any]) -> str:
    return f"{found['kl']:.4f} ({found['perplexity']:.2f})"


def _times(model: str, found: dict[str, Any]) -> list[str]:
    longest_first = sorted(found.values(), key=lambda run: -len(run["seconds"]))
    stages = list(dict.fromkeys(stage for run in longest_first for stage in run["seconds"]))
    run = next(iter(found.values()))
    texts = list(run.get("texts", {}))
    columns = [*(f"{stage}, s" for stage in stages), "together, min", "peak memory, GB", *(f"KL on {text}" for text in texts)]
    lines = [
        f"### {model}: `rankwise compress --rate 0.2` from start to end, its own text\n",
        *(f"Judged on {run['texts'][text]['tokens']:,} tokens of each text.\n" for text in texts[:1]),
        f"| effort, machine | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for effort, run in found.items():
        cells = [f"{run['seconds'].get(stage, 0):.0f}" for stage in stages]
        cells += [f"{sum(run['seconds'].values()) / 60:.1f}", f"{run['peak_memory_bytes']['host'] / 1e9:.2f}"]
        lines.append(f"| {effort} | " + " | ".join(cells + [cell(run["texts"][text]) for text in texts]) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M-Instruct", "MGM-9M"])
    parser.add_argument("--calibrations", nargs="+", default=["c4", "self"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--forms", nargs="+", default=[*FORMS])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on; 0 for as many as the effort says")
    parser.add_argument("--judge-samples", type=int, default=64)
    parser.add_argument("--time", nargs="*", default=[])
    parser.add_argument("--neurons", choices=["all", "fewer"], help="of what is timed (default: the command's own)")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-real-models")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep() -> None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(tables(results))

    for model in args.models:
        folder, work, found = args.real_models / model, args.work / model, results.setdefault(model, {})
        for effort in args.time:
            how = ", ".join([effort, machine(), *([f"--neurons {args.neurons}"] if args.neurons else [])])
            found.setdefault("timed", {})[how] = timed(folder, effort, args, work)
            keep()
        if args.time:
            continue
        if "quantized" not in found:
            texts = {name: path for name, path in texts_of(folder, args.data, work).items() if name != "c4"}
            found["quantized"] = quantized_of(folder, texts, args.judge_samples)
        for calibration, form in itertools.product(args.calibrations if model != "MGM-9M" else ["self"], args.forms):
            key = f"calibrated on {calibration}" + (f", {args.samples} windows of {LENGTH}" if args.samples else "")
            rows = merged(found.get(key, []), contest_of(folder, calibration, form, args, work))
            found[key] = with_bytes(rows, found["quantized"]["dense"]["bytes"])
            keep()
    print(tables(results))


if __name__ == "__main__":
    main()
