"""How long the knapsack takes at the sizes of real models, how far above a bound it ends, and what HiGHS finds.

    python benchmarks/knapsack.py [--limit 60]

Prices are power laws i^-a, a between 0.5 and 2, each matrix at a scale of its own; "noisy" ones times
exp(N(0, 1)), in no order. The bound is the best Lagrangian one, found here by bisection. HiGHS solves the
integer programme of the options that can be in a better plan than ours, to a gap of 1e-3, for at most `--limit`
seconds, where there are at most 100,000 of them. One thread; seconds are the processor's. Writes
benchmarks/results/knapsack.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from rankwise.allocation.knapsack import RELATIVE_GAP, knapsack
from rankwise.allocation.plan import Budget, Ranks, Shapes, options, parameters
from rankwise.layers.matrices import Shape

HERE = Path(__file__).parent
BLOCK = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)} | {
    "gate": (11008, 4096),
    "up": (11008, 4096),
    "down": (4096, 11008),
}
DENSE = {f"{layer}.{name}": Shape(*size) for layer in range(32) for name, size in BLOCK.items()}
SIZES = ((768, 2048), (2048, 768))
MIXTURE = {f"{i}.{e}.{n}": Shape(*size) for i in range(48) for e in range(128) for n, size in enumerate(SIZES)}
CASES = {
    "four blocks of 7B": (dict(list(DENSE.items())[:28]), 0.0, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "7B": (DENSE, 0.0, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "7B, noisy": (DENSE, 1.0, (0.1, 0.3, 0.5)),
    "48 layers of 128 experts": (MIXTURE, 0.0, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "48 layers of 128 experts, noisy": (MIXTURE, 1.0, (0.1, 0.3, 0.5)),
}
LARGEST = 100_000  # options given to HiGHS
Curves = list[tuple[Any, Any]]  # cost and loss of each matrix's options


def prices_of(shapes: Shapes, noise: float) -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    prices = {}
    for name, shape in shapes.items():
        falling = generator.lognormal() * np.arange(1.0, shape.full_rank + 1) ** -generator.uniform(0.5, 2)
        prices[name] = torch.from_numpy(falling * np.exp(noise * generator.standard_normal(shape.full_rank)))
    return prices


def curves_of(prices: dict[str, Tensor], shapes: Shapes) -> Curves:
    costs = {shape: np.array([shape.parameters(r) for r in options(shape, 1)]) for shape in set(shapes.values())}
    tails = {name: price.flip(0).cumsum(0).flip(0).numpy() for name, price in prices.items()}
    return [(costs[s], np.append(tails[n][1 : len(costs[s])], 0.0)) for n, s in shapes.items()]


def loss_of(ranks: Ranks, prices: dict[str, Tensor]) -> float:
    return sum(prices[name][rank:].sum().item() for name, rank in ranks.items() if rank is not None)


def dual(curves: Curves, budget: int) -> tuple[float, float]:
    """The best Lagrangian bound, and its multiplier."""
    low, high, best = 0.0, 1.0, (0.0, 0.0)
    for _ in range(60):
        rate = (low * high) ** 0.5 if low else high / 100
        spent, reduced = 0, 0.0
        for cost, loss in curves:
            values = loss + rate * cost
            at = values.argmin()
            spent, reduced = spent + int(cost[at]), reduced + float(values[at])
        best = max(best, (reduced - rate * budget, rate))
        low, high = (rate, high) if spent > budget else (low, rate)
    return best


def highs(curves: Curves, budget: int, ours: float, bound: float, rate: float, limit: float) -> str:
    """Its two cells: seconds, and our loss over that of its plan."""
    reduced = [loss + rate * cost for cost, loss in curves]
    kept = [np.flatnonzero(r - r.min() <= ours - bound + 1e-9 * ours) for r in reduced]
    if sum(map(len, kept)) > LARGEST:
        return "too large | "
    loss = np.concatenate([loss[k] for (_, loss), k in zip(curves, kept, strict=True)])
    cost = np.concatenate([cost[k] for (cost, _), k in zip(curves, kept, strict=True)])
    matrix = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    one_each = csr_array((np.ones(len(loss)), (matrix, np.arange(len(loss)))))
    since = time.process_time()
    result = milp(
        c=loss / ours,
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / budget, -np.inf, 1)],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": limit, "presolve": False},
    )
    seconds = f"{time.process_time() - since:.1f}" + " (stopped)" * (result.status == 1)
    if result.x is None:
        return f"{seconds} | found none"
    return f"{seconds} | {ours / float(loss[result.x > 0.5].sum()) - 1:+.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60, help="seconds of HiGHS for each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"One thread, seconds of the processor, scipy {scipy.__version__}, numpy {np.__version__}; "
        f"HiGHS stopped after {args.limit:.0f} s of the clock.\n",
        "| model | matrices | rate | seconds | above the bound | HiGHS, seconds | our loss over its |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, (shapes, noise, rates) in CASES.items():
        prices = prices_of(shapes, noise)
        curves = curves_of(prices, shapes)
        for rate in rates:
            budget = Budget.of(shapes, rate, "linear", 0)
            since = time.process_time()
            ranks = knapsack(prices, shapes, budget)
            seconds = time.process_time() - since
            assert parameters(ranks, shapes) <= budget.parameters
            ours = loss_of(ranks, prices)
            bound, multiplier = dual(curves, budget.parameters)
            theirs = highs(curves, budget.parameters, ours, bound, multiplier, args.limit)
            line = f"| {title} | {len(shapes):,} | {rate} | {seconds:.2f} | {ours / bound - 1:.1e} | {theirs} |"
            print(line, flush=True)
            lines.append(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines.append(f"\nPeak resident memory of the process, prices and HiGHS included: {peak:.1f} GiB.")
    (HERE / "results" / "knapsack.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
