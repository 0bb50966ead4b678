"""Where a matrix stands in its model: a layer and a type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

EXPERT = re.compile(r"(_matrices|experts)\.\d+")


class Place(NamedTuple):
    """layer: its number, after its stack's name where there are several stacks; "" outside of all layers. kind: the rest of
    the path, the same for all experts of a layer."""

    layer: str
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of every matrix, by its path."""
    found = {name: re.match(r"(.*?)\.(\d+)\.(.*)", name) for name in names}
    stacks = {match[1] for match in found.values() if match}
    return {
        name: Place(f"{_last_name(match[1])} {match[2]}" if len(stacks) > 1 else match[2], EXPERT.sub(r"\1", match[3]))
        if match
        else Place("", name)
        for name, match in found.items()
    }


def _last_name(stack: str) -> str:
    """ "encoder" of "encoder.block", "layers" of "layers"."""
    return stack.split(".")[-2] if "." in stack else stack


def short(name: str) -> str:
    """Without what all share: "q" of "q_proj"; but GPT-2's "c_proj" whole, since "c" says nothing."""
    return re.sub(r"(?<!^c)(_proj|_matrices)$", "", name)


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """A short name for every type, no two alike: of as few of its last names as tell it apart."""
    kinds = list(dict.fromkeys(kinds))
    seen = Counter(ending for kind in kinds for ending in _endings(kind))
    return {kind: next((ending for ending in _endings(kind) if seen[ending] == 1), kind) for kind in kinds}


def _endings(kind: str) -> list[str]:
    """Its last name, its last two, ..., the whole."""
    *before, last = kind.split(".")
    return [".".join([*before[len(before) - count :], short(last)]) for count in range(len(before) + 1)] + [kind]
