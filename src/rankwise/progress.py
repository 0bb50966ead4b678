"""How far a long stage is: a bar on a terminal, a few plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], doing: str) -> tqdm[T]:
    """The items, while a bar shows what is being done to them, how far it is and how long it still takes."""
    return tqdm(items, desc=doing)
