"""The README's picture, from real_models.json and forms.json in benchmarks/results: python scripts/plot_real_models.py"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
MODEL, KEY = "SmolLM2-135M-Instruct", "calibrated on c4, 64 windows of 256"
UNIFORM = {  # form -> colour and name
    "pair": ("#bbbbbb", "uniform ranks, pairs of factors (SVD-LLM)"),
    "pivoted": ("#8c8c8c", "uniform ranks, pivoted"),
}
LEARNED = {  # way -> colour and name
    "pairs of factors": ("#d98b2b", "rankwise, pairs of factors"),
    "pivoted, and MLPs with fewer neurons": ("#2c6fbb", "rankwise"),
}


def draw(axis: Axes, line: tuple[str, str], points: list[tuple[float, float]]) -> None:
    """A line of its colour and name through the points, of bytes and KL."""
    sizes, costs = zip(*points, strict=True)
    axis.plot([size / 1e6 for size in sizes], costs, "o-", color=line[0], label=line[1], markersize=4)


def main() -> None:
    models, forms = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())[MODEL] for name in ("real_models", "forms")
    )
    rows, quantized = models[KEY], forms["quantized"]
    texts, dense = list(rows[0]["texts"]), quantized["dense"]["bytes"]
    plt.rcParams |= {"svg.hashsalt": "rankwise", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    figure, axes = plt.subplots(1, len(texts), figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, text in zip(axes, texts, strict=True):
        for form, line in UNIFORM.items():
            own = [row for row in rows if (row["form"], row["method"]) == (form, "uniform")]
            draw(axis, line, [(row["bytes"], row["texts"][text]["kl"]) for row in own])
        for way, line in LEARNED.items():
            own = [row for row in forms["costs"] if (row["way"], row["allocation"]) == (way, "llrc")]
            draw(axis, line, [(dense - 2 * row["rate"] * quantized["compressible"], row["kl"][text]) for row in own])
        for width in ("int8", "int4"):
            at = quantized[width]["bytes"] / 1e6, quantized[width]["texts"][text]["kl"]
            axis.plot(*at, "x", color="#333333")
            axis.annotate(f"dense {width}", at, (0, 6), textcoords="offset points", ha="center")
        axis.set(yscale="log", xlabel="MB", title=text, xlim=(90, 260))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL to the original, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "assets" / "kl_against_bytes.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
