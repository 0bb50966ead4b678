"""Speed against the ideal: low-rank layers and whole decoders beside dense ones, random weights at the shapes of Llamas.

    python benchmarks/speed.py [--sizes 1B 7B 13B] [--rates 0.2 0.4 0.6] [--dtypes float32 bfloat16] [--threads 2]
                               [--device cpu] [--prompt 512] [--decoders 1B] [--compile]

Ideal is dense over compressed bytes (decoding one token) or flops (prefill of a prompt). Dense and compressed run in turn in one
process, medians of the paired ratios. Weights are cold, as in a whole model: decoding goes round copies that fill 256 MiB.
Ranks are multiples of --multiple, and so are the neurons of decoders whose MLPs alone are smaller. On a GPU layers run one by
one and as a CUDA graph. --compile: decoders through `torch.compile` as well. Writes benchmarks/results/speed.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.layers.lowrank import FORMS, PairLinear, PivotedLinear
from rankwise.layers.matrices import Shape, find_matrices
from rankwise.runtime.bench import Load, all_compiled, times
from rankwise.runtime.latency import Weights
from rankwise.runtime.optimize import optimize
from rankwise.runtime.pack import pack
from rankwise.runtime.timing import alternating, ratio

HERE = Path(__file__).parent
SIZES = {  # hidden, intermediate, attention heads, key-value heads: Llama 3.2 1B, Llama 2 7B and 13B
    "1B": (2048, 8192, 32, 8),
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
}
COLD = 2**28  # bytes
PACKED = {"": (False, False), ", packed": (False, True), ", both packed": (True, True)}  # dense, low-rank
GRAPH, NARROW = ", CUDA graph", "fewer neurons"
WAYS = {
    "as loaded": ("dense", "as loaded"),
    "compiled": ("compiled dense", "compiled"),
    "optimised": ("dense", "optimised"),
    "packed": ("dense", "packed"),
    "packed over packed": ("packed dense", "packed"),
}


def shapes_of(size: str) -> list[Shape]:
    hidden, inner, heads, kv_heads = SIZES[size]
    outs = [(hidden, hidden), (hidden * kv_heads // heads, hidden), (inner, hidden), (hidden, inner)]
    return [Shape(m, n) for m, n in dict.fromkeys(outs)]


def options_of(shape: Shape, rate: float, multiple: int) -> dict[str, tuple[Shape, int]]:
    """The forms to time, each with its rank."""
    pair, pivoted = (replace(shape, form=layer.form) for layer in (PairLinear, PivotedLinear))
    rank, more = (of.rank_within(int((1 - rate) * of.dense)) // multiple * multiple for of in (pair, pivoted))
    return {"pair": (pair, rank), "pivoted": (pivoted, more), "pivoted, the pair's rank": (pivoted, rank)}


@torch.inference_mode()
def run(layers: list[nn.Module], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


def graph_of(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], None]:
    """What `run` launches, as one CUDA graph."""
    for _ in range(3):
        run(layers, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(layers, x)
    return graph.replay


def layer_speedups(
    weights: Weights, shape: Shape, rank: int, repeats: int, packed: tuple[bool, bool], prompt: int, graphs: bool
) -> tuple[float, float]:
    """Speed-up of decoding one token and of prefill. packed: the dense layers, the low-rank ones."""
    dtype, pools = weights.buffer.dtype, []
    for option, packs in zip((None, rank), packed, strict=True):
        count = max(2, COLD // (shape.parameters(option) * dtype.itemsize))
        pool = nn.ModuleList(weights.layer(shape, option) for _ in range(count))
        pools.append(list(pack(pool) if packs else pool))
    speedups = []
    for tokens, turns in ((1, 3 * repeats), (prompt, repeats)):
        x = torch.randn(1, tokens, shape.in_features).to(weights.buffer)
        used = pools if tokens == 1 else [pool[:2] for pool in pools]
        tasks = [graph_of(pool, x) if graphs else functools.partial(run, pool, x) for pool in used]
        seconds = alternating(tasks, turns)
        speedups.append(ratio(*([s / len(pool) for s in own] for own, pool in zip(seconds, used, strict=True))))
    return speedups[0], speedups[1]


def decoder(size: str, layers: int, dtype: torch.dtype, device: str, neurons: int | None = None) -> Any:
    hidden, inner, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=neurons or inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=dtype).to(device).eval().requires_grad_(False)


def compress_at_random(model: Any, rate: float, multiple: int, form: str) -> Any:
    weights = Weights(COLD, model.dtype, model.device)
    for name, shape in find_matrices(model)[0].items():
        layer: Any = weights.layer(*options_of(shape, rate, multiple)[form])
        for factor in (layer.first, layer.second):
            factor.weight = nn.Parameter(factor.weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        model.set_submodule(name, layer)
    return model


def inner_left(size: str, rate: float, multiple: int) -> int:
    """The neurons of MLPs that alone make up for the rate."""
    hidden, inner, heads, kv_heads = SIZES[size]
    attention = 2 * hidden**2 * (1 + kv_heads / heads)
    return round((inner - rate * (attention / (3 * hidden) + inner)) / multiple) * multiple


def decoder_speedups(
    size: str, rate: float, form: str, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Phase -> the "ideal" speed-up, and those of `WAYS`."""
    dense = functools.partial(decoder, size, args.layers, dtype, args.device)

    def small() -> Any:
        if form == NARROW:
            return dense(inner_left(size, rate, args.multiple))
        return compress_at_random(dense(), rate, args.multiple, form)

    load = Load(1, args.prompt, 16)
    models = {"dense": dense(), "as loaded": small()}
    if form != NARROW:
        models["optimised"] = optimize(small())
    if dtype == torch.bfloat16 and args.device == "cpu":
        models |= {"packed": pack(small()), "packed dense": pack(dense())}
    seconds = times(list(models.values()), load, args.repeats)
    own = {phase: dict(zip(models, found, strict=True)) for phase, found in seconds.items()}
    if args.compile:
        pair = all_compiled([models["dense"], models["as loaded"]], load)
        for phase, found in times(pair, load, args.repeats).items():
            own[phase] |= dict(zip(("compiled dense", "compiled"), found, strict=True))
    return {
        phase: {way: ratio(found[over], found[under]) for way, (over, under) in WAYS.items() if under in found}
        | {"ideal": ideal_of(models["dense"], models["as loaded"], phase)}
        for phase, found in own.items()
    }


def ideal_of(dense: Any, small: Any, phase: str) -> float:
    """Dense over compressed numbers that are multiplied with, the output head among them where one token is decoded."""
    head = dense.lm_head.weight.numel() * (phase == "decode")

    def numbers(model: Any) -> int:
        return head + sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    return numbers(dense) / numbers(small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 0.4, 0.6])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--decoders", nargs="*", default=["1B"], choices=list(SIZES))
    parser.add_argument("--layers", type=int, default=4, help="of the decoders")
    parser.add_argument("--multiple", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--compile", action="store_true", help="the decoders as well")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "speed.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = f"{platform.machine()}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    machine = f"{where}, torch {torch.__version__}, ranks multiples of {args.multiple}"
    head = " | ".join(f"rate {rate}: decode | prefill {args.prompt}" for rate in args.rates)
    lines = [f"Speed-up over the dense layer (and its share of the ideal); {machine}.\n", f"| layer | form | {head} |"]
    lines.append("|---|---|" + "---|---|" * len(args.rates))
    for name in args.dtypes:
        dtype = getattr(torch, name)
        weights = Weights(2 * COLD, dtype, args.device)
        kinds = PACKED if dtype == torch.bfloat16 and args.device == "cpu" else {"": (False, False)}
        kinds |= {} if args.device == "cpu" else {GRAPH: (False, False)}
        for kind, size in itertools.product(kinds, args.sizes):
            for shape in shapes_of(size):
                rows: dict[str, list[str]] = {}
                for rate in args.rates:
                    for form, (of, rank) in options_of(shape, rate, args.multiple).items():
                        ideal = of.dense / of.parameters(rank)
                        found = layer_speedups(weights, of, rank, args.repeats, kinds[kind], args.prompt, kind == GRAPH)
                        rows.setdefault(form, []).extend(f"{speedup:.2f} ({speedup / ideal:.0%})" for speedup in found)
                for form, cells in rows.items():
                    layer = f"{name}{kind}, {size}, {shape.in_features} to {shape.out_features}"
                    lines.append(f"| {layer} | {form} | {' | '.join(cells)} |")
                    print(lines[-1], flush=True)
    lines.append(
        f"\nWhole decoder of {args.layers} layers, batch 1: prompt of {args.prompt} tokens, then 16 with the key-value cache.\n"
    )
    lines += [f"| decoder | form | phase | ideal | {' | '.join(WAYS)} |", "|---" * (4 + len(WAYS)) + "|"]
    for name in args.dtypes:
        for size in args.decoders:
            for rate, form in itertools.product(args.rates, (*FORMS, NARROW)):
                phases = decoder_speedups(size, rate, form, getattr(torch, name), args)
                for phase, own in phases.items():
                    ideal = own["ideal"]
                    cells = [f"{ideal:.2f}", *(f"{own[w]:.2f} ({own[w] / ideal:.0%})" if w in own else "" for w in WAYS)]
                    lines.append(f"| {name}, {size}, rate {rate} | {form} | {phase} | {' | '.join(cells)} |")
                    print(lines[-1], flush=True)
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
