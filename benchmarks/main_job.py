"""The main job's figures: uniform whitened SVD, LLRC as published, LLRC's default, on three really trained models.

    python benchmarks/main_job.py [--models babyllama-tok105 stories260k bundled] [--rates 0.1 0.2 0.3 0.4]

Calibration: the first 2,000 stories of tinystories-3000.jsonl (the bundled model: the standard library's training split).
Judged on the last 500 stories (the held-out split), all of their windows of 256 tokens. Needs the data folder beside
the repository (--data). Writes benchmarks/results/main_job.md; what was computed is kept in --work and not computed again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rankwise.contest import hold_contest

HERE = Path(__file__).parent
METHODS = {"uniform": "whitened", "llrc:paper": "activation", "llrc": "kronecker"}
LENGTH = 256


def stories(data: Path, work: Path) -> tuple[str, str]:
    """Calibration and held-out stories as files of their own."""
    lines = (data / "text/tinystories-3000.jsonl").read_text().splitlines(keepends=True)
    work.mkdir(parents=True, exist_ok=True)
    calibration, held_out = work / "first-2000.jsonl", work / "last-500.jsonl"
    calibration.write_text("".join(lines[:2000]))
    held_out.write_text("".join(lines[-500:]))
    return str(calibration), str(held_out)


def contest_of(model: str, rates: list[float], data: Path, work: Path, seed: int) -> list[dict[str, Any]]:
    calibration, held_out = ("stdlib:train", "stdlib:held-out") if model == "bundled" else stories(data, work)
    return hold_contest(
        None if model == "bundled" else data / "models" / model,
        rates,
        [held_out],
        work / f"{model}-{seed}",
        allocations=list(METHODS),
        calibration=calibration,
        length=LENGTH,
        seed=seed,
        neurons="all",
    )


def table(model: str, results: list[dict[str, Any]], rates: list[float]) -> str:
    """KL and perplexity at each rate, a line per method, as Markdown."""
    dense, tokens = results[0]["reference_perplexity"], results[0]["tokens"]
    lines = [
        f"### {model}: KL to the dense model, nats per token (perplexity; dense {dense:.3f}; {tokens:,} tokens)\n",
        "| method | " + " | ".join(f"rate {rate}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for method in dict.fromkeys(row["method"] for row in results):
        cells = {row["rate"]: f"{row['kl']:.4f} ({row['perplexity']:.3f})" for row in results if row["method"] == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(rate, "not run") for rate in rates) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["babyllama-tok105", "stories260k", "bundled"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-main-job")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parts = [table(m, contest_of(m, args.rates, args.data, args.work, args.seed), args.rates) for m in args.models]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "main_job.md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
