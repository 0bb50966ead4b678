"""Measurements that start at the first block with a mask: the same figures, with less work."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.masks import student as student_module
from rankwise.masks import trunk as trunk_module
from rankwise.masks.layers import hard_mask
from rankwise.masks.student import Student
from rankwise.testing.allocators import tiny_student


def deep() -> Student:
    """A student of three blocks with a model of its own."""
    student = tiny_student("whitened", layers=3)
    return replace(student, model=copy.deepcopy(student.model))


def only(student: Student, block: int) -> dict[str, Tensor | None]:
    """A mask on the matrices of one block."""
    return {n: hard_mask(2, len(d.spectrum)) for n, d in student.decompositions.items() if f".{block}." in n}


def counted(student: Student, block: int) -> list[int]:
    """A list that grows each time the block runs, by the rows that it is given."""
    runs: list[int] = []
    layer: Any = student.model.get_submodule(f"model.layers.{block}.mlp")
    layer.register_forward_hook(lambda module, inputs, output: runs.append(len(inputs[0])))
    return runs


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_measurement_is_that_of_the_whole_model(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, whole = deep(), deep()
    monkeypatch.setattr(student_module.Trunk, "of", lambda *_: None)
    expected = whole.divergence(only(whole, block))
    monkeypatch.undo()
    assert student.divergence(only(student, block)) == expected > 0


def test_blocks_before_the_first_mask_do_not_run() -> None:
    student = deep()
    student.divergence(only(student, 1))  # the original is run once
    first, last = counted(student, 0), counted(student, 1)
    student.divergence(only(student, 1))
    assert not first
    assert len(last) == len(student.selection)
    student.divergence(only(student, 0) | only(student, 1))
    assert len(first) == len(student.selection)


def test_blocks_that_later_ones_read_from_are_run() -> None:
    student, whole, notes = deep(), deep(), list[Tensor]()
    expected = whole.divergence(only(whole, 2))
    first, last = (student.model.get_submodule(f"model.layers.{block}.mlp") for block in (0, 2))
    first.register_forward_hook(lambda module, inputs, output: notes.append(output))
    last.register_forward_pre_hook(lambda module, inputs: notes.pop() * 0 + inputs[0])
    assert student.divergence(only(student, 2)) == expected


def test_nothing_is_kept_beyond_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_module, "KEPT_BYTES", 0)
    student = deep()
    expected = deep().divergence(only(student, 1))
    first = counted(student, 0)
    assert student.divergence(only(student, 1)) == expected
    assert first


def test_a_model_that_hands_on_more_than_hidden_states_is_run_whole() -> None:
    """Its second block reads what the first one left elsewhere."""
    student, whole = deep(), deep()
    for each in (student, whole):
        layers: Any = each.model.get_submodule("model.layers")
        left: list[Tensor] = []
        layers[0].register_forward_pre_hook(lambda m, inputs, left=left: left.append(inputs[0]))
        layers[1].mlp.register_forward_hook(lambda m, inputs, output, left=left: output + left.pop())
    whole.__dict__["_trunk"] = None
    assert student.divergence(only(student, 1)) == whole.divergence(only(whole, 1))


def test_the_original_is_unchanged_afterwards() -> None:
    student = deep()
    batch = student.selection[0]
    with torch.no_grad():
        before = student.model(**batch).logits
        student.divergence(only(student, 1))
        assert torch.equal(student.model(**batch).logits, before)
