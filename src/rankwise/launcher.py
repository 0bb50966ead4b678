"""Which of several processes this is, by the variables that launchers set; an empty one counts as absent.

Loads no torch. A process alone is the first, whatever number it was given.
"""

from __future__ import annotations

import os


def size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def local_size() -> int:
    """How many of the processes are on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process among those on this machine, from 0."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else otherwise
