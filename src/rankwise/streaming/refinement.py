"""Refinements block by block: what is trained of a block is on disk before the next one is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rankwise import stages
from rankwise.allocation.problem import Allocation
from rankwise.layers.linear import with_tensors
from rankwise.masks.layers import folded
from rankwise.masks.student import Layers
from rankwise.refinement.blocks import BlockByBlock
from rankwise.refinement.refinement import if_better
from rankwise.run_folder import digest
from rankwise.streaming.activations import Activations
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent


def refine(
    stream: Stream, student: StreamedStudent, chosen: Allocation, form: str, refinements: Sequence[BlockByBlock]
) -> list[dict[str, Any]]:
    """As `stages.refine`: a record of each step. The student ships the refined layers from here on."""
    model, masks = stream.run.model, {name: mask for name, mask in chosen.masks.items() if mask is not None}

    def layer(name: str) -> nn.Module:
        dense = model.get_submodule(name)
        return folded(dense, student.decompositions[name], masks[name], form) if name in masks else dense

    student.shipped = student.layers_of([*masks, *(name for name in stream.run.narrow if name not in masks)], layer)
    key, history = digest(stream.run.identity, form, *(part for item in masks.items() for part in item)), []
    for refinement in refinements:
        key = digest(key, refinement)
        learning = stages.learning_student(stream.run, student, key)
        refined = functools.partial(_refined, stream, learning, refinement, key)
        student.shipped, records = if_better(student, student.shipped, refinement, refined)
        history += records
    return history


def _refined(stream: Stream, student: StreamedStudent, refinement: BlockByBlock, key: str, losses: list[float]) -> Layers:
    """The student's shipped layers, trained."""
    before, hidden = student.shipped, [Activations(f"refined-{which}", stream.room) for which in ("original", "compressed")]

    def layers_of(index: int) -> Layers:
        return {name: before[name] for name in stream.matrices_of(index) if name in before}

    with stream.opened():
        for _ in refinement.in_turn(student, stream.blocks, layers_of, (hidden[0], hidden[1]), losses):
            pass
    for states in hidden:
        states.clear()
    return student.layers_of(before, _reader(stream, before, key))


def _reader(stream: Stream, before: Layers, key: str) -> Callable[[str], nn.Module]:
    """What makes a layer anew of what was kept of its block, which is held until another block's is wanted. Each process reads
    for itself: only the first writes the result."""
    held: dict[int, dict[str, Tensor]] = {}

    def layer(name: str) -> nn.Module:
        index = stream.blocks.block_of(name)
        assert index is not None
        if index not in held:
            held.clear()  # before the next is there
            held[index] = stream.run.folder.cached(f"refinement/block-{index}", digest(key), dict)
        return with_tensors({name: before[name]}, held[index])[name]

    return layer
