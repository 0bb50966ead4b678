"""How much memory a streamed run needs, known before the long work; and how the rest is shared out.

Legend: m, n a matrix's outputs and inputs, T the tokens of a batch, d the hidden size, e the bytes of a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from rankwise.calibration.signal import LOGITS_AT_ONCE
from rankwise.calibration.tokens import Batch, vocabulary_of
from rankwise.errors import RankwiseError
from rankwise.footprint import LIBRARIES, LOGITS, ORDERING, SLACK, TRAINED, components, moments_of, workspace
from rankwise.layers.matrices import Shape
from rankwise.memory import gigabytes, resident
from rankwise.streaming.blocks import StoredBlocks

TOKENS_AT_ONCE = 2048  # that a block is differentiated on


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
    blocks: StoredBlocks,
    shapes: dict[str, Shape],
    batches: Sequence[Batch],
    needs: Collection[str],
    gradients: bool,
    trained: int = 0,
    narrows: bool = False,
) -> Share:
    """Share `memory` bytes out, for a metric's `needs`, with `gradients` for passes back, for a block that is `trained` on so
    many tokens at once, and for MLPs that may lose neurons where the run `narrows`. Raises `RankwiseError` with the figure needed
    where they are not enough."""
    tokens = max(next(iter(batch.values())).numel() for batch in batches)
    length = max(next(iter(batch.values())).shape[1] for batch in batches)
    outputs = "output" in needs
    largest_site = max(moments_of(shape, outputs) for shape in shapes.values())
    fixed = resident() + LIBRARIES
    vocabulary = vocabulary_of(blocks.model)
    logits = length * vocabulary
    if blocks.head_by_rows:
        logits = min(logits, max(LOGITS_AT_ONCE, vocabulary))
    phases = _phases(blocks, shapes, tokens, length, logits, outputs)
    if gradients:
        phases |= _gradient_phases(blocks, shapes, sequences_at_once(batches) * length, outputs)
    if narrows:
        phases |= _narrowing_phase(blocks, shapes, outputs)
    if trained:
        phases |= _training_phase(blocks, shapes, max(trained, length))
    needed = int(fixed + SLACK * max(phases.values()))
    if needed > memory:
        phase = max(phases, key=lambda name: phases[name])
        raise RankwiseError(
            f"memory: {gigabytes(memory)} is not enough, {gigabytes(needed)} are needed: "
            f"{gigabytes(fixed)} for Python, torch and what is read, "
            f"{gigabytes(int(SLACK * phases[phase]))} for {phase}; give more, or use shorter "
            "windows",
        )
    spare = memory - needed
    sites = Counter[int | None]()
    for name, shape in shapes.items():
        sites[blocks.block_of(name)] += moments_of(shape, outputs)
    more = min(spare // 2, max(sites.values()) - largest_site)
    return Share(spare - more, largest_site + more)


def _sizes(blocks: StoredBlocks) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each parameter, and of each group outside of blocks."""
    sizes = {name: p.numel() * p.element_size() for name, p in blocks.model.named_parameters(remove_duplicate=False)}
    return sizes, {group: sum(sizes[name] for name in names) for group, names in blocks.outside().items()}


def _phases(
    blocks: StoredBlocks, shapes: dict[str, Shape], tokens: int, length: int, logits: int, outputs: bool
) -> dict[str, int]:
    """The most bytes that each part of the work holds at once."""
    sizes, outside = _sizes(blocks)
    block = max(sum(sizes[name] for name in blocks.names(i)) for i in range(len(blocks)))
    largest = max(sizes[name] for i in range(len(blocks)) for name in blocks.names(i))
    groups = (group for i in range(len(blocks)) for group in blocks.source.together(blocks.names(i)))
    together = max(sum(sizes[name] for name in group) for group in groups)
    e = max(p.element_size() for p in blocks.model.parameters())
    d = blocks.width
    widest = max(max(shape.in_features, shape.out_features) for shape in shapes.values())
    working = tokens * ((8 * d + 4 * widest) * e + 8 * d)  # a block's own values, its norms in float32
    seen = max(8 * s.in_features**2 + 4 * tokens * s.in_features + 2048 * s.in_features for s in shapes.values())
    solved = max(moments_of(s, outputs) + workspace(s, outputs) for s in shapes.values())
    return {
        "the embedding": 2 * outside["embedding"] + outside["rest"] + 2 * tokens * d * e,
        "a block as it is read": outside["rest"] + block + together,
        "a block's statistics": outside["rest"] + block + largest + working + seen,
        "a block's decomposition": outside["rest"] + block + solved,
        "a block and its factors": outside["rest"] + 2 * block + max(3 * largest, together) + working,
        "the output head": 2 * outside["head"] + outside["rest"] + LOGITS * logits + 8 * length * d * e,
    }


def _gradient_phases(blocks: StoredBlocks, shapes: dict[str, Shape], tokens: int, outputs: bool) -> dict[str, int]:
    """As `_phases`, of the passes back on `tokens` at once: a block, its full-length factors, and what its gradient needs."""
    sizes, outside = _sizes(blocks)
    e = max(p.element_size() for p in blocks.model.parameters())
    d = blocks.width
    most = 0
    for index in range(len(blocks)):
        names = blocks.names(index)
        of_block = {name: shape for name, shape in shapes.items() if blocks.block_of(name) == index}
        own = of_block.values()
        factors = sum(e * shape.full_rank * shape.per_rank for shape in own)
        kept = _kept_for_gradients(blocks, of_block)
        widest = max((max(shape.in_features, shape.out_features) for shape in own), default=0)
        seen = max((moments_of(shape, outputs) + 4 * tokens * widest for shape in own), default=0)
        held = sum(sizes[name] for name in names) + max(factors + max(sizes[name] for name in names), seen)
        most = max(most, held + tokens * (kept * e + 12 * widest + 8 * d))
    return {"a block's gradients": outside["rest"] + most}


def no_room_for_fewer_neurons(
    memory: int, folder: Path, blocks: StoredBlocks, shapes: dict[str, Shape], needs: Collection[str]
) -> str | None:
    """Why MLPs cannot lose neurons in so many bytes of memory and on the disk of the run's folder; None where they can."""
    outputs = "output" in needs
    fixed, phase = resident() + LIBRARIES, _narrowing_phase(blocks, shapes, outputs)
    if (needed := int(fixed + SLACK * max(phase.values()))) > memory:
        return f"fewer neurons need {gigabytes(needed)} of memory, {gigabytes(memory)} are promised"
    e = max(p.element_size() for p in blocks.model.parameters())
    kept = sum(moments_of(s, outputs) for s in shapes.values() if s.out_features != s.in_features)  # those of MLPs, and some more
    needed = kept + e * components(shapes)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    found = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # of the run that goes on
    if needed > (free := disk_usage(there).free + found):
        return f"fewer neurons need {gigabytes(needed)} beside the output for a while, {gigabytes(free)} are free there"
    return None


def _narrowing_phase(blocks: StoredBlocks, shapes: dict[str, Shape], outputs: bool) -> dict[str, int]:
    """As `_phases`, of the neurons of an MLP that are put in order, and of its last matrix fitted to those that stay."""
    sizes, outside = _sizes(blocks)
    block = max(sum(sizes[name] for name in blocks.names(i)) for i in range(len(blocks)))
    widest = max(shape.in_features for shape in shapes.values())
    held = max(moments_of(shape, outputs) for shape in shapes.values())
    return {"the neurons of an MLP": outside["rest"] + 2 * block + held + ORDERING * 8 * widest**2}


def _training_phase(blocks: StoredBlocks, shapes: dict[str, Shape], tokens: int) -> dict[str, int]:
    """As `_phases`, of a block whose factors are trained on `tokens` at once: with its layers before and after."""
    sizes, outside = _sizes(blocks)
    e = max(p.element_size() for p in blocks.model.parameters())
    most = 0
    for index in range(len(blocks)):
        of_block = {name: shape for name, shape in shapes.items() if blocks.block_of(name) == index}
        numbers = sum(shape.dense for shape in of_block.values())
        held = sum(sizes[name] for name in blocks.names(index)) + (TRAINED + 2 * e) * numbers
        most = max(most, held + tokens * (_kept_for_gradients(blocks, of_block) * e + 32 * blocks.width))
    return {"a block's refinement": outside["rest"] + most}


def _kept_for_gradients(blocks: StoredBlocks, of_block: dict[str, Shape]) -> int:
    """Numbers that a block with these matrices keeps of each token for the way back."""
    own = sum(_share_of_tokens(blocks, name) * (shape.per_rank + 3 * shape.full_rank) for name, shape in of_block.items())
    return 16 * blocks.width + int(own)


def _share_of_tokens(blocks: StoredBlocks, name: str) -> float:
    """How many of all tokens a matrix sees: those of a mixture share each token's few experts."""
    chosen = getattr(blocks.model.config.get_text_config(), "num_experts_per_tok", None)
    if not chosen or not name.startswith(tuple(f"{path}." for path in blocks.source.experts)):
        return 1.0
    experts: Any = blocks.model.get_submodule(name.rpartition(".")[0])
    return min(1.0, chosen / len(experts))
