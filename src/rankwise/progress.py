"""How far a long stage is: a bar with the time it still takes on a terminal; in a pipe or a log a line at its start, one a minute
and one at its end. All of it goes to standard error; TQDM_DISABLE=1 silences it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY = 60.0  # seconds


class Lines(Generic[T]):
    """What `tqdm` is on a terminal, as plain lines; of a stage inside of another one nothing is said."""

    _shown: ClassVar[bool] = False

    def __init__(self, items: Iterable[T], desc: str) -> None:
        self.items, self.doing = items, desc
        self.size = f" of {len(items):,}" if isinstance(items, Sized) else ""

    def __iter__(self) -> Iterator[T]:
        if Lines._shown:
            yield from self.items
            return
        Lines._shown = True
        since = last = time.perf_counter()
        done, ended = 0, False
        say(f"{self.doing} ...")
        try:
            for item in self.items:
                yield item
                done += 1
                if time.perf_counter() - last >= LINE_EVERY:
                    last = time.perf_counter()
                    say(f"{self.doing}: {done:,}{self.size}{self._left(done, last - since)}")
            ended = True
        finally:
            Lines._shown = False
            how_far = "done" if ended else f"stopped after {done:,}{self.size}"
            say(f"{self.doing}: {how_far}, {time.perf_counter() - since:.1f} s")

    def _left(self, done: int, seconds: float) -> str:
        if not isinstance(self.items, Sized):
            return ""
        return f", {tqdm.format_interval(seconds / done * (len(self.items) - done))} to go"

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Nothing: figures that change at each step are for a terminal."""


def progress(items: Iterable[T], doing: str) -> tqdm[T] | Lines[T]:
    """The items, while it is shown what is being done to them, how far it is and how long it still takes."""
    return tqdm(items, desc=doing, leave=None) if sys.stderr.isatty() else Lines(items, doing)


@contextmanager
def stage(doing: str) -> Iterator[None]:
    """One thing that takes long is being done inside."""
    for _ in progress([None], doing):
        yield


def say(line: str) -> None:
    """Print a line on standard error, above the bar where there is one."""
    if not os.environ.get("TQDM_DISABLE"):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
