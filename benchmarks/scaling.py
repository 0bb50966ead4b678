"""How the cost of `compress` grows with the hidden size, the layers and the calibration tokens, and by which power.

    python benchmarks/scaling.py [--threads 2]

Random Llamas (ffn 2.75 times the hidden size), uniform ranks on whitened, in memory. One of the three grows at a time. Cost is
the seconds of calibration and of decomposition, the two stages that every allocation shares. The exponent is the slope of the
line through the logarithms of the three largest sizes. Writes benchmarks/results/scaling.md and scaling.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise

HERE = Path(__file__).parent
LENGTH = 128
BASE = {"hidden size": 256, "layers": 4, "tokens": 8192}
GROWN = {
    "hidden size": [128, 256, 512, 1024],
    "layers": [2, 4, 8, 16],
    "tokens": [4096, 8192, 16384, 32768],
}
STAGES = ("calibration", "decomposition")


def cost(hidden: int, layers: int, tokens: int) -> dict[str, float]:
    """Seconds by stage."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        vocab_size=1024,
    )
    windows = torch.randint(1024, (tokens * 5 // 4 // LENGTH, LENGTH))  # a fifth is for choosing and measuring
    report = rankwise.compress(LlamaForCausalLM(config), 0.2, calibration=windows, allocation="uniform").report
    return {stage: max(report["seconds"][stage], 0.01) for stage in STAGES}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope in logarithms through the three largest."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cost(64, 1, 1024)  # warms up
    lines = [f"{args.threads} threads, torch {torch.__version__}; what does not grow: {BASE}.\n"]
    lines += ["| grows | stage | seconds | exponent |", "|---|---|---|---|"]
    figure, axes = plt.subplots(1, len(GROWN), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (name, sizes) in zip(axes, GROWN.items(), strict=True):
        costs = [cost(*(BASE | {name: size}).values()) for size in sizes]
        for stage in STAGES:
            seconds = [c[stage] for c in costs]
            power = exponent(sizes, seconds)
            axis.loglog(sizes, seconds, "o-", label=f"{stage}: power {power:.2f}")
            cells = ", ".join(f"{size}: {s:.2f}" for size, s in zip(sizes, seconds, strict=True))
            lines.append(f"| {name} | {stage} | {cells} | {power:.2f} |")
        axis.set_xlabel(name)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("seconds")
    figure.savefig(HERE / "results" / "scaling.png", dpi=120)
    (HERE / "results" / "scaling.md").write_text("\n".join(lines) + "\n\n![seconds as the work grows](scaling.png)\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
