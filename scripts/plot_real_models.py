"""The README's picture, from benchmarks/results/real_models.json: python scripts/plot_real_models.py"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
MODEL, KEY = "SmolLM2-135M-Instruct", "calibrated on c4, 64 windows of 256"
LINES = {  # form and method -> colour and name
    ("pair", "uniform"): ("#bbbbbb", "uniform ranks, pairs of factors (SVD-LLM)"),
    ("pivoted", "uniform"): ("#8c8c8c", "uniform ranks, pivoted"),
    ("pair", "llrc"): ("#d98b2b", "rankwise, pairs of factors"),
    ("pivoted", "llrc"): ("#2c6fbb", "rankwise"),
}


def main() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "real_models.json").read_text())[MODEL]
    rows, quantized = found[KEY], found["quantized"]
    texts = list(rows[0]["texts"])
    plt.rcParams |= {"svg.hashsalt": "rankwise", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    figure, axes = plt.subplots(1, len(texts), figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, text in zip(axes, texts, strict=True):
        for (form, method), (colour, name) in LINES.items():
            own = [row for row in rows if (row["form"], row["method"]) == (form, method)]
            points = zip(*((row["bytes"] / 1e6, row["texts"][text]["kl"]) for row in own), strict=True)
            axis.plot(*points, "o-", color=colour, label=name, markersize=4)
        for width in (name for name in quantized if name != "dense"):
            at = quantized[width]["bytes"] / 1e6, quantized[width]["texts"][text]["kl"]
            axis.plot(*at, "x", color="#333333")
            axis.annotate(f"dense {width}", at, (0, 6), textcoords="offset points", ha="center")
        axis.set(yscale="log", xlabel="MB", title=text, xlim=(90, 260))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL to the original, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LINES), frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "assets" / "kl_against_bytes.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
