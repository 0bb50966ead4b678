"""How much memory a streamed run needs, known before the long work; and how the rest is shared out.

Legend: m, n a matrix's outputs and inputs, T the tokens of a batch, d the hidden size, e the bytes of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError
from rankwise.layers.matrices import Shape
from rankwise.streaming.blocks import Blocks

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
LIBRARIES = 400 * 2**20  # what torch, its kernels and the solvers take beyond what is resident when the figure is made
TOKENS_AT_ONCE = 2048  # that a block is differentiated on
SLACK = 1.1  # for what an allocator cannot give back at once


def bytes_of(text: str) -> int:
    """The bytes that "8GB", "512 MiB" or a plain number means. Raises `RankwiseError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise RankwiseError(f"memory={text!r}: a number with one of {', '.join(u for u in UNITS if u)}, as 8GB")
    return int(float(match[1]) * UNITS[match[2]])


def resident() -> int:
    """Bytes of this process in memory now; 1 GiB where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 2**30


@dataclass(frozen=True)
class Share:
    """What is left for hidden states kept in memory, and for the moments of the sites that are collected in one pass."""

    activations: int
    statistics: int


def sequences_at_once(batches: Iterable[Batch]) -> int:
    """How many sequences a block is differentiated on at once."""
    return max(1, TOKENS_AT_ONCE // max((next(iter(batch.values())).shape[1] for batch in batches), default=1))


def share_out(
    memory: int,
    blocks: Blocks,
    shapes: dict[str, Shape],
    batches: Sequence[Batch],
    vocabulary: int,
    needs: Collection[str],
    gradients: bool,
) -> Share:
    """Share `memory` bytes out, for a metric's `needs` and, with `gradients`, passes back. Raises `RankwiseError` with the figure
    needed where they are not enough."""
    tokens = max(next(iter(batch.values())).numel() for batch in batches)
    length = max(next(iter(batch.values())).shape[1] for batch in batches)
    outputs = "output" in needs
    largest_site = max(_moments(shape, outputs) for shape in shapes.values())
    fixed = resident() + LIBRARIES
    phases = _phases(blocks, shapes, tokens, length, vocabulary, outputs)
    if gradients:
        phases |= _gradient_phases(blocks, shapes, sequences_at_once(batches) * length, length, vocabulary, outputs)
    needed = int(fixed + SLACK * max(phases.values()))
    if needed > memory:
        phase = max(phases, key=lambda name: phases[name])
        raise RankwiseError(
            f"memory: {_gigabytes(memory)} is not enough, {_gigabytes(needed)} are needed: {_gigabytes(fixed)} for Python, "
            f"torch and what is read, {_gigabytes(int(SLACK * phases[phase]))} for {phase}; give more, or shorter windows"
        )
    spare = memory - needed
    sites = sum(_moments(shape, outputs) for name, shape in shapes.items() if _block(name) == "0")
    more = min(spare // 2, max(sites - largest_site, 0))
    return Share(spare - more, largest_site + more)


def _sizes(blocks: Blocks) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each parameter, and of each group outside of blocks."""
    sizes = {name: p.numel() * p.element_size() for name, p in blocks.model.named_parameters(remove_duplicate=False)}
    return sizes, {group: sum(sizes[name] for name in names) for group, names in blocks.outside().items()}


def _moments(shape: Shape, outputs: bool) -> int:
    """Bytes of a matrix's second moments, of its outputs too where those are needed."""
    return 8 * shape.in_features**2 + 8 * shape.out_features**2 * outputs


def _phases(blocks: Blocks, shapes: dict[str, Shape], tokens: int, length: int, vocabulary: int, outputs: bool) -> dict[str, int]:
    """The most bytes that each part of the work holds at once."""
    sizes, outside = _sizes(blocks)
    block = max(sum(sizes[name] for name in blocks.names(i)) for i in range(len(blocks)))
    largest = max(sizes[name] for i in range(len(blocks)) for name in blocks.names(i))
    config: Any = blocks.model.config
    e = max(p.element_size() for p in blocks.model.parameters())
    d = config.get_text_config().hidden_size
    widest = max(max(shape.in_features, shape.out_features) for shape in shapes.values())
    working = tokens * ((8 * d + 4 * widest) * e + 8 * d)  # a block's own values, its norms in float32
    seen = max(8 * s.in_features**2 + 4 * tokens * s.in_features + 2048 * s.in_features for s in shapes.values())
    solved = max(_moments(s, outputs) + workspace(s, outputs) for s in shapes.values())
    return {
        "the embedding": 2 * outside["embedding"] + outside["rest"] + 2 * tokens * d * e,
        "a block's statistics": outside["rest"] + block + largest + working + seen,
        "a block's decomposition": outside["rest"] + block + solved,
        "a block and its factors": outside["rest"] + 2 * block + largest + working,
        "the output head": 2 * outside["head"] + outside["rest"] + length * vocabulary * (2 * e + 24),
    }


def _gradient_phases(
    blocks: Blocks, shapes: dict[str, Shape], tokens: int, length: int, vocabulary: int, outputs: bool
) -> dict[str, int]:
    """As `_phases`, of the passes back on `tokens` at once: a block, its full-length factors, and what its gradient needs."""
    sizes, outside = _sizes(blocks)
    e = max(p.element_size() for p in blocks.model.parameters())
    d = blocks.model.config.get_text_config().hidden_size
    most = 0
    for index in range(len(blocks)):
        names = blocks.names(index)
        own = [shape for name, shape in shapes.items() if f"{name}.weight" in names]
        factors = sum(e * shape.full_rank * shape.per_rank for shape in own)
        kept = sum(shape.in_features + shape.out_features + 3 * shape.full_rank for shape in own) + 16 * d
        widest = max((max(shape.in_features, shape.out_features) for shape in own), default=0)
        seen = max((_moments(shape, outputs) + 4 * tokens * widest for shape in own), default=0)
        held = sum(sizes[name] for name in names) + max(factors + max(sizes[name] for name in names), seen)
        most = max(most, held + tokens * (kept * e + 12 * widest + 8 * d))
    return {
        "a block's gradients": outside["rest"] + most,
        "the output head's gradients": 2 * outside["head"] + outside["rest"] + length * vocabulary * (2 * e + 36),
    }


def whole_run(model: nn.Module, shapes: Mapping[str, Shape], needs: Collection[str]) -> int:
    """Bytes that a run in memory takes: the model, its full-length factors and the moments; no site is taken as shared."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    e = max(p.element_size() for p in model.parameters())
    factors = sum(e * shape.full_rank * shape.per_rank for shape in shapes.values())
    sides = (("second", "in_features"), ("output", "out_features"))
    return size + factors + sum(8 * getattr(s, side) ** 2 for need, side in sides if need in needs for s in shapes.values())


def workspace(shape: Shape, outputs: bool) -> int:
    """Bytes that `decompose` takes at its peak for float32 or smaller weights, beyond the weight and the moments, as measured:
    the most of two moments of it, where products are formed and where they are solved. With a metric on outputs it is float64
    throughout, and of a tall weight that metric's root may be the largest part."""
    m, n = shape.out_features, shape.in_features
    if m <= n and outputs:
        return max(26 * m * n + 26 * m * m, 16 * m * n + 44 * m * m)
    if m <= n:
        return max(22 * m * n + 8 * m * m, 12 * m * n + 36 * m * m)
    if outputs:
        return max(16 * m * m + 16 * m * n, 8 * m * m + 32 * m * n + 40 * n * n)
    return max(12 * m * n + 22 * n * n, 8 * m * n + 46 * n * n)


def _block(name: str) -> str:
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else ""


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:.2f} GB"
