"""Recipes are values: what made a result makes it again, as a whole or with something else in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankwise as package
from rankwise import Recipe
from rankwise.allocation.kl_knapsack import KLKnapsack

Run = Callable[..., Any]
ASKED: dict[str, Any] = {"samples": 12, "length": 32, "form": "pair", "seed": 3}
METHOD = "kl-knapsack points=2 trials=1"


@pytest.fixture(scope="module")
def made(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "small"
    package.compress(llama, 0.3, calibration=str(story), allocation=METHOD, output=output, **ASKED)
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_recipe_makes_the_same_result_again(rankwise: Run, llama: Path, made: Path, tmp_path: Path) -> None:
    for number, recipe in enumerate((made, made / "recipe.yaml")):
        done = rankwise("compress", llama, "--recipe", recipe, "-o", tmp_path / str(number))
        assert done.code == 0, done.err
        assert weights(tmp_path / str(number)) == weights(made)
    in_python = package.compress(llama, recipe=Recipe.read(made), output=tmp_path / "python")
    assert weights(tmp_path / "python") == weights(made)
    assert in_python.recipe == Recipe.read(made)


def test_what_is_said_beside_a_recipe_counts(llama: Path, made: Path) -> None:
    read = Recipe.read(made)
    higher = package.compress(llama, 0.5, recipe=read).recipe
    assert higher == read.model_copy(update={"rate": 0.5})
    smaller = package.compress(llama, recipe=read, target_bytes="60KB").recipe
    assert (smaller.rate, smaller.target_bytes, smaller.options) == (None, 60_000, read.options)
    other = package.compress(llama, recipe=read, allocation="uniform").recipe
    assert (other.allocation, other.options, other.decomposition, other.seed) == ("uniform", {}, "whitened", 3)


def test_an_allocator_that_was_given_as_an_object_is_in_the_recipe(llama: Path, story: Path, made: Path) -> None:
    given = package.compress(llama, 0.3, calibration=str(story), allocation=KLKnapsack(points=2, trials=1), **ASKED)
    assert given.ranks == package.compress(llama, recipe=given.recipe).ranks
    assert (given.recipe.allocation, given.recipe.options) == ("kl-knapsack", {"points": 2, "trials": 1})


class Mine(KLKnapsack):
    """An allocator of the user's own, which no name finds."""


def test_of_an_allocator_of_ones_own_the_object_is_given_beside_the_recipe(llama: Path, story: Path) -> None:
    own = Mine(points=2, trials=1)
    given = package.compress(llama, 0.3, calibration=str(story), allocation=own, **ASKED)
    with pytest.raises(package.RankwiseError, match=r"unknown allocation 'Mine'.*give its object beside the recipe"):
        package.compress(llama, recipe=given.recipe)
    again = package.compress(llama, recipe=given.recipe, allocation=own)
    assert (again.ranks, again.recipe) == (given.ranks, given.recipe)
    applied = package.compress(llama, plan=package.plan(llama, 0.3, calibration=str(story), allocation=own, **ASKED))
    assert applied.ranks == package.compress(llama, 0.3, calibration=str(story), allocation=own, **ASKED).ranks


def test_a_recipe_by_hand_says_what_it_likes(llama: Path, story: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"rate": 0.4, "calibration": str(story), "allocation": "uniform", "samples": 8, "length": 16}))
    recipe = package.compress(llama, recipe=file).recipe
    assert (recipe.rate, recipe.form, recipe.seed) == (0.4, "pivoted", 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("- rate", "is not a list of options and their values"),
        ("rate: 2", "rate=2"),
        ("ratio: 0.2", "unknown option 'ratio'"),
        ("calibration: given in memory", "give it again, or name another"),
        ("allocation: best", "unknown allocation 'best'"),
    ],
)
def test_a_recipe_that_is_none_is_a_line(rankwise: Run, llama: Path, tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "wrong.yaml"
    if content is not None:
        file.write_text(content)
    done = rankwise("compress", llama, "--recipe", file, "-o", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "out").exists()
