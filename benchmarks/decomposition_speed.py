"""How long the published SVD-LLM procedure and ours take for the same matrices and the same activations, at the same error.

    python benchmarks/decomposition_speed.py [--sizes 1024x2816x4 4096x11008x1] [--once 4096x11008x1] [--device cpu] [--threads 2]

The published one (Wang et al. 2024, arXiv 2403.07378): per matrix, the second moment of its inputs, its Cholesky factor S in
float64, S^-1, the full SVD of W S, and of these the truncated factors U_r sqrt(s_r) and sqrt(s_r) V_r^T S^-1. The SVD is taken in
float64 and, as in the authors' code, in float32. Ours: the second moment once per site, one eigen-decomposition per matrix.

Random weights; activations with variances that fall as 1 / i and a few features a hundred times the rest, as in language models.
Both sides run in turn in one process. Writes benchmarks/results/decomposition_speed.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.calibration.moments import Moments, add_gram, mirrored
from rankwise.calibration.tokens import TOKENS_PER_BATCH
from rankwise.decomposition import whitened
from rankwise.decomposition.solver import decompose

HERE = Path(__file__).parent
RATE = 0.2


def sites_of(hidden: int, ffn: int, once: bool) -> list[tuple[int, dict[str, int]]]:
    """The input points of a Llama block: features, and the outputs of each matrix there; with `once`, one of each shape."""
    if once:
        return [(hidden, {"q": hidden, "gate": ffn}), (ffn, {"down": hidden})]
    return [
        (hidden, {"q": hidden, "k": hidden, "v": hidden}),
        (hidden, {"o": hidden}),
        (hidden, {"gate": ffn, "up": ffn}),
        (ffn, {"down": hidden}),
    ]


def activations(tokens: int, features: int, generator: torch.Generator, device: str) -> Tensor:
    """[tokens, features] float32."""
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(tokens, features, generator=generator) / torch.arange(1, features + 1).sqrt()
    x = x @ mixing
    x[:, :4] *= 100
    return x.to(device)


def plain_second_moment(x: Tensor) -> Tensor:
    H = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(TOKENS_PER_BATCH):
        H += part.T @ part
    return H


def second_moment(x: Tensor) -> Tensor:
    H = None
    for part in x.split(TOKENS_PER_BATCH):
        H = add_gram(H, part)
    assert H is not None
    return mirrored(H)


def published(W: Tensor, H: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B [m, r] and A [r, n] by Cholesky, inverse and SVD; the shift is the authors', for what is not positive definite."""
    S, failed = torch.linalg.cholesky_ex(H)
    if failed:
        S = torch.linalg.cholesky(H + (1e-6 - torch.linalg.eigvalsh(H)[0]) * torch.eye(len(H), dtype=H.dtype, device=H.device))
    inverse = torch.linalg.inv(S).to(dtype)
    U, s, Vt = torch.linalg.svd(W.to(dtype) @ S.to(dtype), full_matrices=False)
    root = s[:rank].sqrt()
    return U[:, :rank] * root, (root[:, None] * Vt[:rank]) @ inverse


def ours(W: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    d = decompose(W, *whitened.roots(Moments(input=H)))
    return d.second[:, :rank], d.first[:rank]


def eigenvalues(W: Tensor, H: Tensor) -> Tensor:
    """The spectrum alone: no procedure that knows it can be faster."""
    W = W.double()
    return torch.linalg.eigvalsh(W @ H @ W.T if len(W) <= W.shape[1] else W.T @ W)


def error(W: Tensor, H: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """||X (W - B A)^T|| / ||X W^T||."""
    D, W = W.double() - factors[0].double() @ factors[1].double(), W.double()
    return ((((D @ H) * D).sum() / ((W @ H) * W).sum()) ** 0.5).item()


class Timer:
    """Seconds by name."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        since = time.perf_counter()
        result = work()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since
        return result


METHODS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "published, SVD in float64": functools.partial(published, dtype=torch.float64),
    "published, SVD in float32": functools.partial(published, dtype=torch.float32),
    "ours": ours,
}


FLOOR = "its eigenvalues alone"


def measure(hidden: int, ffn: int, layers: int, tokens: int, device: str, once: bool = False) -> str:
    """The table of one size, as Markdown; with `once`, of a block's seven matrices one of each shape."""
    generator = torch.Generator().manual_seed(0)
    solving, moments = Timer(device), Timer(device)
    by_kind: dict[str, dict[str, float]] = {}
    worst: dict[str, float] = {}
    for _ in range(layers):
        for features, matrices in sites_of(hidden, ffn, once):
            x = activations(tokens, features, generator, device)
            H = moments("ours", functools.partial(second_moment, x))
            for kind, outputs in matrices.items():
                moments("published", functools.partial(plain_second_moment, x))
                W = (torch.randn(outputs, features, generator=generator) / features**0.5).to(device)
                rank = int((1 - RATE) * outputs * features / (outputs + features))
                errors = {}
                for name, method in (METHODS | {FLOOR: lambda W, H, rank: eigenvalues(W, H)}).items():
                    before = solving.seconds.get(name, 0.0)
                    found = solving(name, functools.partial(method, W, H, rank))
                    seconds = by_kind.setdefault(kind, {})
                    seconds[name] = seconds.get(name, 0.0) + solving.seconds[name] - before
                    if name != FLOOR:
                        errors[name] = error(W, H, found)
                    print(f"{kind}, {name}: {solving.seconds[name] - before:.2f} s", file=sys.stderr, flush=True)
                for name, value in errors.items():
                    worst[name] = max(worst.get(name, 0.0), value / errors["published, SVD in float64"] - 1, key=abs)
            del x, H
    slowest = solving.seconds["published, SVD in float64"]
    lines = [
        f"### hidden {hidden}, ffn {ffn}, {layers} layer{'s' * (layers > 1)}: seconds for "
        f"{'one matrix of each shape' if once else 'all matrices'}\n",
        "| | " + " | ".join(by_kind) + " | all | faster | error over the first's, at most |",
        "|---|" + "---|" * (len(by_kind) + 3),
    ]
    for name, total in solving.seconds.items():
        kinds = " | ".join(f"{by_kind[kind][name]:.2f}" for kind in by_kind)
        over = f"{worst[name]:+.1e}" if name in worst else ""
        lines.append(f"| {name} | {kinds} | {total:.2f} | {slowest / total:.1f}x | {over} |")
    per_matrix, per_site = moments.seconds["published"], moments.seconds["ours"]
    lines.append(
        f"\nSecond moments of {tokens:,} tokens: {per_matrix:.2f} s once per matrix (published), {per_site:.2f} s once per site "
        f"(ours): {per_matrix / per_site:.1f}x.\n"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1024x2816x4", "4096x11008x1"], metavar="HIDDENxFFNxLAYERS")
    parser.add_argument("--once", nargs="*", default=[], help="sizes of which one matrix of each shape is enough")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(128, 256, 1, 512, args.device)  # warms up
    parts = [f"{args.threads} threads, {args.device}, torch {torch.__version__}, rate {RATE}.\n"]
    for size in args.sizes:
        hidden, ffn, layers = map(int, size.split("x"))
        parts.append(measure(hidden, ffn, layers, args.tokens, args.device, size in args.once))
        print(parts[-1], flush=True)
    (HERE / "results" / "decomposition_speed.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
