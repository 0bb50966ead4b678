"""The best model in so many bytes: low rank, fewer bits and both together, at the same bytes of the same matrices.

    python benchmarks/bytes.py [--models SmolLM2-135M-Instruct MGM-9M] [--bits 6.25 4.25 3.25 2.75 2.5] [--alike 8 4 3 2]
                               [--peers HQQ] [--texts WikiText-2 C4] [--samples 64] [--judge-samples 32]

Every plan is made from one set of statistics and judged on the same windows: all matrices rounded to nearest,
by GPTQ as published, or as rankwise does, at each number of bits; a number of bits for every matrix; a rank
or a number of bits for every matrix (`--bits mixed`); a rank for every matrix in 16 bits. Sizes are bits per
weight of the matrices, scales and indices counted; embeddings and norms stay as they are. Texts are those of
real_models.py. All that is found is kept in benchmarks/results/bytes.json and printed to bytes.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from main_job import HERE
from peers import PEERS, rounded
from real_models import LENGTH, machine, texts_of
from torch import Tensor

from rankwise import few_bits, stages, starting
from rankwise.allocation.kl_knapsack import KLKnapsack
from rankwise.allocation.mixed import Mixed
from rankwise.allocation.offer import Offer
from rankwise.allocation.plan import Budget
from rankwise.allocation.problem import Allocation
from rankwise.calibration.batches import batches_of
from rankwise.calibration.tokens import Batch, windows_of, written
from rankwise.decomposition.grid import Grid, unit_of
from rankwise.decomposition.kronecker import input_root
from rankwise.decomposition.metric import metric_named
from rankwise.decomposition.rounding import each_group
from rankwise.evaluation.protocols import read_judging_text
from rankwise.layers.linear import bias_of, tensors_in, weight_of
from rankwise.layers.precision import widened
from rankwise.layers.quantised import BYTE, EARLIER_GROUP, WIDTHS, QuantisedLinear
from rankwise.masks.student import Layers
from rankwise.recipe import Recipe
from rankwise.refining import changed_modules
from rankwise.run_folder import RunFolder, digest

RESULTS = HERE / "results" / "bytes.json"
METRIC = Mixed.decomposition
WAYS = {
    "nearest": "every matrix alike, every number rounded to nearest",
    "gptq": "every matrix alike, GPTQ as published, a scale of 16 bits for 64 numbers",
    "alike": "every matrix alike (`--bits N --decomposition kronecker`)",
    **{peer: f"every matrix alike, {peer}" for peer in PEERS},
    "bits": "bits for every matrix",
    "mixed": "**bits or a rank for every matrix** (`--bits mixed`)",
    "rank": "a rank for every matrix, 16 bits (kl-knapsack)",
}


class Contest:
    """A model with its statistics, offers and judging text."""

    def __init__(self, folder: Path, args: argparse.Namespace, work: Path) -> None:
        self.folder, texts = folder, texts_of(folder, args.data, work)
        calibration = texts.pop("c4", "self")
        texts = {name: path for name, path in texts.items() if not args.texts or name in args.texts}
        self.recipe = Recipe.of(rate=0.5, length=LENGTH, samples=args.samples, dtype="bfloat16", calibration=calibration)
        self.run = starting.start(folder, calibration, None, self.recipe, [], RunFolder(work / "bytes"))
        with widened(self.run.model):
            self.statistics = stages.collect_statistics(self.run, metric_named(METRIC).NEEDS)
            decompositions = stages.decompose_all(self.run, self.statistics, METRIC)
        self.student = stages.student_of(self.run, decompositions, METRIC)
        self.judges = {name: self._judge(path, args.judge_samples) for name, path in texts.items()}
        self.numbers = sum(shape.dense for shape in self.run.shapes.values())

    @functools.cached_property
    def offers(self) -> dict[str, Offer]:
        """Every matrix at every number of bits, which takes minutes."""
        return few_bits.offers_of(self.run, self.statistics, self.student.decompositions, METRIC, 1)

    def _judge(self, path: str, samples: int) -> list[Batch]:
        text = read_judging_text(path)
        assert self.run.tokenizer is not None
        windows = windows_of(self.run.tokenizer, text.documents, LENGTH, samples, 0)
        return batches_of(self.run.model, windows[: text.windows])

    def allocated(self, bits: float, allocator: Any, offers: Mapping[str, Offer]) -> Allocation:
        """What the allocator makes of so many bits per weight; without offers its budget is of numbers of 16 bits."""
        budget = Budget(int(self.numbers * bits / (8 if offers else 16)))
        with widened(self.run.model):
            return stages.allocate(self.run, self.student, METRIC, allocator, budget, None, offers)

    def written(self, way: str, chosen: Allocation) -> tuple[Layers, float]:
        """The layers of a plan, and bytes of its matrices."""
        run, linear = self.run, {name: self.run.model.get_submodule(name) for name in chosen.bits}
        if way in PEERS:
            windows = torch.cat([written(batch) for batch in [*run.data.training, *run.data.selection]])
            [bits] = {*chosen.bits.values()}
            model, size = rounded(way, self.folder, windows, bits)
            return changed_modules(model, run.model), self.numbers * size / 8
        if way == "nearest":
            layers = {n: by_nearest(weight_of(m), chosen.bits[n], bias_of(m)) for n, m in linear.items()}
        elif way == "gptq":
            roots = {name: input_root(self.statistics.of(name)) for name in linear}
            layers = {n: by_gptq(weight_of(m), roots[n].metric, chosen.bits[n], bias_of(m)) for n, m in linear.items()}
        else:
            decompositions = self.student.decompositions
            dtypes = {name: weight_of(run.model.get_submodule(name)).dtype for name in run.shapes}
            held = sum(s.stored_bytes(chosen.ranks[n], chosen.bits.get(n), dtypes[n]) for n, s in run.shapes.items())
            return few_bits.written_in_bits(run, self.statistics, decompositions, METRIC, chosen, self.recipe.form), held
        return layers, sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers.values())

    def row(self, way: str, chosen: Allocation) -> dict[str, Any]:
        """What a plan takes and costs."""
        run, since = self.run, time.perf_counter()
        layers, held = self.written(way, chosen)
        self.student.shipped = dict(layers)
        found = {}
        with widened(self.run.model):
            for name, batches in self.judges.items():
                key = digest(
                    run.identity, *tensors_in(layers).values(), *(p for i in chosen.masks.items() for p in i), name, len(batches)
                )
                found[name] = stages.cached_comparison(run, self.student, chosen, batches, key).to_dict()
        self.student.shipped = {}
        return {
            "way": way,
            "bits": 8 * held / self.numbers,
            "low_rank": sum(rank is not None for rank in chosen.ranks.values()),
            "matrices": len(run.shapes),
            "predicted": chosen.history[-1]["kl"] if way in ("bits", "mixed") else None,
            "seconds": round(time.perf_counter() - since, 1),
            "machine": machine(),
            "texts": {
                name: {k: f[k] for k in ("kl", "perplexity", "reference_perplexity", "tokens")} for name, f in found.items()
            },
        }


def by_nearest(W: Tensor, bits: int, bias: Tensor | None) -> QuantisedLinear:
    """W [m, n] in whole numbers, each the nearest one, with the scales of least squared error."""
    grid = Grid(bits, unit_of(W.detach(), 2.0 ** (bits - 1)))
    return QuantisedLinear.of(*each_group(W, grid), grid.unit, bits, bias, coding="grid")


def by_gptq(W: Tensor, H: Tensor, bits: int, bias: Tensor | None) -> QuantisedLinear:
    """W [m, n] as in Frantar et al. 2023, arXiv 2210.17323, with the second moment of inputs H [n, n]: columns from the first to
    the last, once, scales with the least squared error of their group as it is reached."""
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    U = (U / U.diagonal()[:, None]).float()
    rest, most = W.detach().float().T.clone(), 2 ** (bits - 1)
    codes, steps = torch.empty_like(rest), []
    for begin in range(0, len(rest), EARLIER_GROUP):
        group = rest[begin : begin + EARLIER_GROUP]
        sizes = group.abs().amax(0) / (most - 0.5) * torch.linspace(1, 0.5, 20)[:, None, None]
        errors = ((group / sizes).round().clamp(-most, most - 1) * sizes - group).square().sum(1)
        step = sizes[:, 0].gather(0, errors.argmin(0)[None])[0].to(W.dtype)
        for j in range(begin, begin + len(group)):
            codes[j] = (rest[j] / step.float()).round().clamp(-most, most - 1)
            rest[j + 1 :] -= U[j, j + 1 :, None] * (rest[j] - codes[j] * step.float())
        steps.append(step)
    return QuantisedLinear.of(codes.T.to(torch.int8), torch.stack(steps, 1), None, bits, bias)


def plans(
    contest: Contest, sizes: list[float], widths: list[int], peers: list[str], mixed: Mixed
) -> list[tuple[str, float, Callable[[], Allocation]]]:
    """Each way at each size, and what makes the plan."""
    dense = {name: offer.of_bits() for name, offer in contest.offers.items()} if sizes else {}
    found: list[tuple[str, float, Callable[[], Allocation]]] = []
    for way in ("alike", "gptq", "nearest", *peers):
        few = [bits for bits in widths if bits < BYTE or way == "alike"]  # all round 8 bits to nearest
        found += [(way, bits, lambda bits=bits: few_bits.all_in(contest.run, bits)) for bits in few]  # type: ignore[misc]
    for bits in sizes:
        found.append(("mixed", bits, lambda bits=bits: contest.allocated(bits, mixed, contest.offers)))  # type: ignore[misc]
        found.append(("bits", bits, lambda bits=bits: contest.allocated(bits, mixed, dense)))  # type: ignore[misc]
        if bits >= 5:
            found.append(("rank", bits, lambda bits=bits: contest.allocated(bits, KLKnapsack(points=2), {})))  # type: ignore[misc]
    return found


def table(results: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    lines: list[str] = []
    for model, rows in results.items():
        for text in rows[0]["texts"]:
            first = rows[0]["texts"][text]
            lines += [
                f"### {model}, judged on {text}: KL in nats per token (perplexity; dense {first['reference_perplexity']:.2f})\n",
                f"{rows[0]['machine']}, {first['tokens']:,} tokens.\n",
                "| bits per weight | way | KL | of low rank | predicted |",
                "|---|---|---|---|---|",
            ]
            for row in sorted(rows, key=lambda row: (-round(row["bits"], 1), [*WAYS].index(row["way"]))):
                cost, predicted = row["texts"][text], "" if row["predicted"] is None else f"{row['predicted']:.4f}"
                ranks = f"{row['low_rank']} of {row['matrices']}" if row["low_rank"] else ""
                cells = [f"{row['bits']:.2f}", WAYS[row["way"]], f"{cost['kl']:.4f} ({cost['perplexity']:.2f})", ranks, predicted]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M-Instruct", "MGM-9M"])
    parser.add_argument("--bits", nargs="*", type=float, default=[6.25, 5.25, 4.25, 3.75, 3.25, 2.75, 2.5])
    parser.add_argument("--tokens", type=int, help="that a matrix is measured on; by default as --bits mixed takes")
    parser.add_argument("--alike", nargs="*", type=int, default=sorted(WIDTHS, reverse=True), help="bits of all matrices alike")
    parser.add_argument("--peers", nargs="*", default=[], choices=[*PEERS], help="other tools, see peers.py")
    parser.add_argument("--texts", nargs="+", default=[], help="to judge on; all of the model's by default")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judge-samples", type=int, default=32)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--real-models", type=Path, default=Path.home() / ".cache" / "real-models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-real-models")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in args.models:
        contest = Contest(args.real_models / model, args, args.work / model)
        rows = {(row["way"], round(4 * row["bits"])): row for row in results.get(model, [])}
        for way, bits, plan in plans(contest, args.bits, args.alike, args.peers, Mixed(tokens=args.tokens)):
            row = contest.row(way, plan())
            rows[way, round(4 * row["bits"])] = row
            costs = ", ".join(f"{name} {found['kl']:.4f}" for name, found in row["texts"].items())
            print(f"{way} {bits}: {row['bits']:.2f} bits, KL {costs}", flush=True)
            results[model] = list(rows.values())
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
