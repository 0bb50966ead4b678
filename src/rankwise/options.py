"""The options of a run by name: as Python types them, and as the command line offers them. `Recipe` says what each means."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_origin

from rankwise.errors import RankwiseError

T = TypeVar("T")


class LoadingOptions(TypedDict, total=False):
    """How a model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str


class ReadingOptions(LoadingOptions, total=False):
    """How a text is read, too."""

    text_column: str
    dataset_options: dict[str, str]


class RefineOptions(ReadingOptions, total=False):
    """What every run on a calibration text takes, `refine` too."""

    effort: Literal["quick", "default", "thorough"]
    samples: int | None
    length: int | None
    seed: int


class CalibrationOptions(RefineOptions, total=False):
    """What every run that chooses matrices takes."""

    include: Sequence[str]
    exclude: Sequence[str]


class DecomposeOptions(CalibrationOptions, total=False):
    """What `decompose` takes."""

    decomposition: str | None


class ExploreOptions(CalibrationOptions, total=False):
    """What `explore` takes."""

    scope: Literal["linear", "model"]
    rank_multiple: int
    form: Literal["pivoted", "pair"]


class ContestOptions(ExploreOptions, total=False):
    """What a contest takes."""

    keep: dict[str, float]
    neurons: Literal["all", "fewer"] | None


class CompressOptions(DecomposeOptions, ContestOptions, total=False):
    """What `compress` and `plan` take."""

    target_bytes: int | str | None
    target_speedup: float | None
    bits: Literal["stored", "mixed", "2", "3", "4", "5", "6", "8"]
    refine: str | None
    preset: str
    options: dict[str, Any]
    memory: str | None


def flag(field: str) -> str:
    """The option of the command line for a field of `Recipe`; a repeated one is in the singular."""
    return f"--{field.removesuffix('s') if field.endswith('options') else field}".replace("_", "-")


def with_options(command: Callable[..., None], fields: Collection[str]) -> Callable[..., None]:
    """The command with an option for each of these fields of `Recipe` after its own. It gets those that were given
    as keywords; the defaults of the others stand where they are used."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = _options(fields) if fields else []
    every = own + options

    @functools.wraps(command)
    def with_fields(**given: Any) -> None:
        asked = {option.name: given.pop(option.name) for option in options}
        command(**given, **{name: _read(name, value) for name, value in asked.items() if value not in (None, [])})

    with_fields.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    with_fields.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return with_fields


def _options(names: Collection[str]) -> list[inspect.Parameter]:
    """The options as typer knows them, in the order of the recipe."""
    from rankwise.recipe import Recipe

    return [_option(name, field) for name, field in Recipe.model_fields.items() if name in names]


def _option(name: str, field: Any) -> inspect.Parameter:
    """An option of the field's type, with what the recipe says about it."""
    import typer

    text = field.description[0].upper() + field.description[1:]
    kinds = [kind for kind in get_args(field.annotation) or [field.annotation] if kind is not type(None)]
    kind: Any = kinds[0] if kinds in ([int], [float]) else str
    choices = [*get_args(kinds[0]), *kinds] if get_origin(kinds[0]) is Literal else kinds
    metavar = "|".join(choice for choice in choices if isinstance(choice, str)) or None
    if get_origin(field.annotation) in (dict, tuple):
        kind, text = list[str], f"{text}; repeatable"
        metavar = None if get_origin(field.annotation) is tuple else "PATTERN=FRACTION" if name == "keep" else "KEY=VALUE"
    elif field.default is not None:
        text += f" (default: {field.default})"
    option = typer.Option(flag(name), help=f"{text}.", metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind | None, option]
    )


def _read(name: str, value: Any) -> Any:
    """What was given, as the field takes it."""
    if name == "keep":
        return pairs(value, "PATTERN=FRACTION", str.rpartition)
    return pairs(value) if name.endswith("options") else value


def pairs(items: Iterable[str], form: str = "KEY=VALUE", split: Any = str.partition) -> dict[str, str]:
    """Texts like KEY=VALUE as a dict. Raises `RankwiseError` for one that is not; `form` is what it should be."""
    found = {}
    for item in items:
        key, equals, value = split(item, "=")
        if not equals or not key:
            raise RankwiseError(f"{item!r} must be written as {form}")
        found[key] = value
    return found


def made_of(cls: type[T], options: Mapping[str, Any], whose: str) -> T:
    """A method with its own options: a dataclass that checks its fields. Raises `RankwiseError` for an option that there is not
    and for a value of the wrong type, which says `whose` they are."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(f.name for f in dataclasses.fields(cls)) or "none"  # type: ignore[arg-type]
        raise RankwiseError(
            f"option {'.'.join(map(str, first['loc']))}={first['input']!r} of {whose}: {first['msg']}; its options are {known}"
        ) from None
