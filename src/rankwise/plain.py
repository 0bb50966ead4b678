"""Plain values for others to read: as JSON, and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The value with None for what JSON has no number for: infinity, and what is not a number at all."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON that every reader takes (see `plain`)."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def shown(value: float | None, form: Callable[[Any], str]) -> str:
    """The value in this form; in words where it is infinite, a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return form(value) if math.isfinite(value) else "infinite" if value > 0 else "-infinite"
