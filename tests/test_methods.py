"""Methods by name: one spelling everywhere, the papers' names too, and a list of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankwise as package
from rankwise.allocation.allocator import ALLOCATORS, PAPERS, allocator_named, known_as, spelled, spelling
from rankwise.allocation.kl_knapsack import KLKnapsack
from rankwise.allocation.llrc_paper import LLRCPaper
from rankwise.contest import all_allocations
from rankwise.recipe import Recipe
from rankwise.reporting.command import command_of

Run = Callable[..., Any]
TEXT: dict[str, Any] = {"samples": 8, "length": 16}


@pytest.mark.parametrize(("name", "presets"), ALLOCATORS.items())
def test_what_makes_an_allocator_is_what_it_is_known_as(name: str, presets: dict[str, Any]) -> None:
    for preset, cls in presets.items():
        assert allocator_named(*spelled(f"{name}:{preset}")) == cls()
        assert known_as(cls()) == (name, preset, {})


WORDS = st.text("abcXYZ019-_.", min_size=1)
OPTIONS = st.dictionaries(WORDS, st.integers() | st.floats() | st.booleans() | WORDS, max_size=3)


@settings(deadline=None)
@given(st.sampled_from([*ALLOCATORS]), WORDS, OPTIONS)
def test_what_is_spelled_is_read_back(name: str, preset: str, options: dict[str, Any]) -> None:
    in_words = {key: str(value) for key, value in options.items()}
    assert spelled(spelling(name, preset, options)) == (name, preset, in_words)


def test_a_command_spells_the_method() -> None:
    recipe = Recipe.of(allocation="kl-knapsack", options={"points": 3}, effort="quick").model_dump()
    assert "--allocation 'kl-knapsack points=3' --output" in (command_of("model", recipe, "out") or "")
    assert command_of("model", recipe | {"options": {"tokens": None}}, "out") is None


def test_the_papers_names_are_other_names(llama: Path, story: Path) -> None:
    assert set(PAPERS.values()) <= ALLOCATORS.keys()
    by_paper = package.compress(llama, 0.3, calibration=str(story), allocation="SVD-LLM", **TEXT)
    by_name = package.compress(llama, 0.3, calibration=str(story), allocation="uniform", **TEXT)
    assert (by_paper.ranks, by_paper.recipe) == (by_name.ranks, by_name.recipe)


def test_a_preset_and_options_are_spelled_with_the_name(llama: Path, story: Path) -> None:
    given = package.compress(
        llama, 0.3, calibration=str(story), allocation="kl-knapsack points=2 trials=4", options={"trials": 1}, **TEXT
    )
    assert given.recipe.options == {"points": 2, "trials": 1}
    typed = package.compress(llama, 0.3, calibration=str(story), allocation=KLKnapsack(2, 1), **TEXT)
    assert given.recipe == typed.recipe
    paper = package.compress(llama, 0.3, calibration=str(story), allocation="llrc:paper max_steps=1", **TEXT).recipe
    assert (paper.allocation, paper.preset, paper.decomposition) == ("llrc", "paper", LLRCPaper.decomposition)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--allocation", "svd-lm"], "unknown allocation 'svd-lm'"),
        (["--allocation", ""], "unknown allocation ''"),
        (["--allocation", "llrc:best"], "has no preset 'best'"),
        (["--allocation", "llrc:paper", "--preset", "default"], "are two presets"),
        (["--allocation", "kl-knapsack points"], "'points' must be written as KEY=VALUE"),
        (["--allocation", "kl-knapsack colour=3"], "option colour='3'"),
    ],
)
def test_what_is_no_method_is_a_line(rankwise: Run, llama: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = rankwise("compress", llama, *arguments, "-o", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ("llrc", "quick", {})),
        ({"options": {"rounds": 1}}, ("llrc", "quick", {"rounds": 1})),
        ({"preset": "default", "options": {"points": 0, "rounds": 0, "value_steps": 0}}, ("llrc", "default", None)),
        ({"allocation": "energy"}, ("energy", "default", {})),
    ],
)
def test_a_quick_run_takes_the_quick_preset_where_no_method_is_named(
    asked: dict[str, Any], expected: tuple[str, str, Any], llama: Path, story: Path
) -> None:
    recipe = package.compress(llama, 0.3, calibration=str(story), effort="quick", **asked, **TEXT).recipe
    assert (recipe.allocation, recipe.preset) == expected[:2]
    assert recipe.options == (asked["options"] if expected[2] is None else expected[2])


def test_all_methods_are_listed(rankwise: Run) -> None:
    listed = json.loads(rankwise("methods", "--json").out)
    assert [row["name"] for row in listed["allocations"]] == all_allocations()
    assert {paper for row in listed["allocations"] for paper in row["papers"]} == PAPERS.keys()
    table = rankwise("methods").out
    assert all(row["when"].split(".")[0][:30] in table for row in (row for rows in listed.values() for row in rows))


def test_the_version_is_told(rankwise: Run) -> None:
    assert rankwise("--version").out == f"rankwise {package.__version__}\n"
