"""The options of Python and of the command line are the recipe's fields, written once each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from rankwise import Recipe, compress
from rankwise.cli import COMMANDS
from rankwise.options import CompressOptions, flag, pairs

WIDER = {"target_bytes": int | str | None, "include": Sequence[str], "exclude": Sequence[str]}  # than what a recipe holds


def test_every_field_is_a_keyword_of_its_type() -> None:
    keywords = get_type_hints(CompressOptions)
    assert keywords == {name: kind for name, kind in get_type_hints(Recipe).items() if name in keywords} | WIDER
    assert Recipe.model_fields.keys() == keywords.keys() | {
        "rate",
        "calibration",
        "allocation",
        "ranks",
        "kept_neurons",
        "widths",
    }  # these have places of their own


@pytest.mark.parametrize("command", list(COMMANDS), ids=lambda command: command.__name__)
def test_every_field_is_an_option_with_its_meaning_and_default(
    command: Callable[..., None], rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = rankwise(command.__name__, "--help").out
    for name in COMMANDS[command]:
        field = Recipe.model_fields[name]
        line = next(line for line in shown.splitlines() if f" {flag(name)} " in line)
        assert str(field.description)[1:] in line
        assert field.default in (None, (), {}) or f"default: {field.default}" in line
        assert get_origin(field.annotation) is not Literal or all(choice in line for choice in get_args(field.annotation))


def test_what_is_written_as_pairs() -> None:
    assert pairs(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    assert pairs(["re:(?=a)b=0.5"], "PATTERN=FRACTION", str.rpartition) == {"re:(?=a)b": "0.5"}


def test_keywords_are_explicit() -> None:
    parameters = inspect.signature(compress).parameters.values()
    assert [str(p.annotation) for p in parameters if p.kind is p.VAR_KEYWORD] == ["Unpack[CompressOptions]"]
