"""Other ways of writing matrices in fewer numbers, each beside pivoted factors in the same norm: which are worth a place in the
package.

    python benchmarks/families.py [--parts attention MLP all] [--gone 0.2 0.4] [--samples 64]

Every family (`otherwise.py`) offers its sizes for the matrices of a part of SmolLM2; what it has none for is pivoted. One
knapsack buys sizes at the errors in the Kronecker norm until so many of the part's numbers are gone, the rest of the model stays
dense, and the KL is measured. The places of what is sparse are counted, in numbers of 16 bits. Attention or MLPs that are left
out are bought at what each costs alone. Nothing is trained. Writes benchmarks/results/families.md, the whole model in dense int8
and int4 beside; what was found is kept in --work, for each --gone, --samples and --judge-samples by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import otherwise
import torch
from main_job import HERE
from otherwise import Model, Way, block, leaf
from real_models import LENGTH, judges_of, quantized_of, texts_of

from rankwise import stages, starting
from rankwise.allocation.mixed import RELATIVE_GAP
from rankwise.allocation.multiple_choice import solve
from rankwise.decomposition import kronecker
from rankwise.progress import progress
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder

MODEL = "SmolLM2-135M-Instruct"
PARTS = {"attention": ("self_attn",), "MLP": ("mlp",), "all": ("self_attn", "mlp")}
READS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "MLP", "up_proj": "MLP"}


class Family(NamedTuple):
    """What it offers a group of matrices, which of them are a group, and in which parts of a model it is tried."""

    ways: Callable[[Model, Sequence[str]], list[Way]]
    parts: tuple[str, ...] = ("attention", "MLP")
    group: Callable[[str], Any] = lambda name: name


def module(name: str) -> str:
    return name.rpartition(".")[0]


def reads_the_same(name: str) -> tuple[str, str]:
    return module(name), READS.get(leaf(name), leaf(name))


def in_two_blocks(name: str) -> Any:
    return (block(name) // 2, leaf(name)) if leaf(name) in READS else name


def an_mlp(name: str) -> str:
    return module(name) if "mlp" in name else name


def v_and_o(name: str) -> str:
    return module(name) if leaf(name) in ("v_proj", "o_proj") else name


FAMILIES = {
    "pairs of factors": Family(otherwise.pairs, (*PARTS,)),
    "**pivoted**": Family(otherwise.pivoted, (*PARTS,)),
    "**fewer neurons**": Family(otherwise.neurons, ("MLP", "all"), an_mlp),
    "narrower values": Family(otherwise.narrower_values, ("attention",), v_and_o),
    "a basis for what reads the same": Family(otherwise.pivoted, group=reads_the_same),
    "a basis for two blocks (Basis Sharing)": Family(otherwise.shared_basis, group=in_two_blocks),
    "ranks for 2 x 2 blocks (Monarch)": Family(otherwise.ranks_for_blocks),
    "4 x 4 blocks (BLAST)": Family(otherwise.blast),
    "sparse factors (ROCKET)": Family(otherwise.sparse_factors),
    "attention or MLPs left out": Family(otherwise.left_out, ("all",), module),
    "sparse weights": Family(otherwise.sparse, (*PARTS,)),
    "two of four weights": Family(otherwise.two_of_four, (*PARTS,)),
}


@torch.no_grad()
def costs(model: Model, family: Family, names: Sequence[str], gone: Sequence[float], judges: Any) -> dict[str, dict[str, float]]:
    """KL on every text where so much of the numbers is gone; nothing where the family has no such sizes."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(family.group(name), []).append(name)
    offers = [family.ways(model, group) for group in progress([*groups.values()], "writing otherwise")]
    numbers = [np.array([round(way.cost) for way in ways]) for ways in offers]
    errors = [np.array([way.error for way in ways]) for ways in offers]
    found = {}
    for part in gone:
        within = int((1 - part) * sum(model.weight(name).numel() for name in names))
        if within >= sum(cost.min() for cost in numbers):
            plan = solve(numbers, errors, within, RELATIVE_GAP).tolist()
            bought = [ways[at] for ways, at in zip(offers, plan, strict=True)]
            layers = model.linears({name: weight for way in bought for name, weight in way.weights().items()})
            found[f"{part:.0%}"] = {text: model.student.cost(layers, batches) for text, batches in judges.items()}
    return found


def opened(texts: dict[str, str], calibration: str, args: argparse.Namespace) -> tuple[Model, list[str], dict[str, Any]]:
    """The model with its statistics, its matrices, and the batches to judge on."""
    folder = args.real_models / MODEL
    recipe = Recipe.of(rate=0.5, length=LENGTH, samples=args.samples, dtype="float32", calibration=calibration)
    run = starting.start(folder, calibration, None, recipe, [], RunFolder(args.work / "run"))
    model = Model(stages.student_of(run, {}, "kronecker"), stages.collect_statistics(run, kronecker.NEEDS))
    return model, [*run.shapes], judges_of(run.model, run.tokenizer, texts, args.judge_samples)


def table(part: str, rows: Mapping[str, Any], quantized: Mapping[str, Any], args: argparse.Namespace) -> str:
    """KL of every family on every text."""
    columns = [(f"{gone:.0%}", text) for gone in args.gone for text in quantized["int8"]["texts"]]
    beside = [f"{bits} {_figures(quantized[bits]['texts'])}" for bits in ("int8", "int4")]
    lines = [
        f"### {MODEL}, {part}: KL in nats per token, so much of its numbers gone\n",
        f"Calibrated on {args.samples} windows of {LENGTH} tokens, judged on {args.judge_samples}. "
        f"The whole model dense in {', in '.join(beside)}.\n",
        "| | " + " | ".join(", ".join(column) for column in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for family in [family for family in FAMILIES if family in rows]:
        cells = [f"{rows[family][gone][text]:.4f}" if gone in rows[family] else "none so small" for gone, text in columns]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(texts: Mapping[str, Any]) -> str:
    return " and ".join(f"{found['kl']:.4f} on {text}" for text, found in texts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=FAMILIES)
    parser.add_argument("--gone", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--judge-samples", type=int, default=8)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-families")
    args = parser.parse_args()
    texts = texts_of(args.real_models / MODEL, args.data, args.work)
    calibration, _ = texts.pop("c4"), texts.pop("questions")
    kept = args.work / f"families-{args.samples}-{args.judge_samples}-{'-'.join(map(str, args.gone))}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    quantized = results.pop("quantized", None) or quantized_of(args.real_models / MODEL, texts, args.judge_samples)
    model, matrices, judges = opened(texts, calibration, args)
    for part in args.parts:
        names = [matrix for matrix in matrices if any(f".{inside}." in matrix for inside in PARTS[part])]
        for family in args.families:
            if part in FAMILIES[family].parts and family not in results.setdefault(part, {}):
                results[part][family] = costs(model, FAMILIES[family], names, args.gone, judges)
                kept.write_text(json.dumps(results | {"quantized": quantized}))
    found = [table(part, results[part], quantized, args) for part in PARTS if part in results]
    (HERE / "results" / "families.md").write_text("\n".join(found))


if __name__ == "__main__":
    main()
