"""The README's picture, from the tables in benchmarks/results/main_job.md: python scripts/plot_main_job.py"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"uniform": "#8c8c8c", "llrc:paper": "#d98b2b", "llrc": "#2c6fbb"}
TITLES = {"uniform": "uniform ranks, whitened SVD", "llrc:paper": "LLRC as published", "llrc": "rankwise"}


def tables(text: str) -> dict[str, dict[str, dict[float, float]]]:
    """model -> method -> rate -> KL, of every table; what was not run is left out."""
    found = {}
    for part in text.split("### ")[1:]:
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line.startswith("|")]
        rates = [float(cell.removeprefix("rate ")) for cell in rows[0][1:]]
        found[part.split(":")[0]] = {
            row[0].split()[0]: {
                rate: float(m[0]) for rate, cell in zip(rates, row[1:], strict=True) if (m := re.match(r"[\d.]+", cell))
            }
            for row in rows[2:]
        }
    return found


def main() -> None:
    found = tables((ROOT / "benchmarks" / "results" / "main_job.md").read_text())
    plt.rcParams |= {"svg.hashsalt": "rankwise", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    figure, axes = plt.subplots(1, len(found), figsize=(9, 3), layout="constrained", sharey=True)
    for axis, (model, methods) in zip(axes, found.items(), strict=True):
        for method, points in methods.items():
            axis.plot(list(points), list(points.values()), "o-", color=COLOURS[method], label=TITLES[method], markersize=4)
        axis.set(yscale="log", xlabel="rate: fraction of parameters removed", title=model, xticks=[0.1, 0.2, 0.3, 0.4])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL to the original, nats per token")
    axes[-1].legend(frameon=False, fontsize=8)
    target = ROOT / "docs" / "assets" / "kl_against_rate.svg"
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
