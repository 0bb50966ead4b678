"""How the page writes figures: with units, and as many digits as are worth reading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.ticker import EngFormatter

from rankwise.plain import shown

THIN = "\u202f"  # a narrow space that does not break, before units


def percent(share: float) -> str:
    """0.1968 -> "19.7 %"."""
    digits = 2 if 0.99 < abs(share) < 1 or 0 < abs(share) < 0.001 else 1
    return f"{100 * share:.{digits}f}{THIN}%"


def significant(value: float) -> str:
    """Four significant digits, five from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def brief(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".") if value else "0"


def millionths(value: float) -> str:
    """In millionths, in as few characters as a cell has room for."""
    count = 1e6 * value
    if count < 999.5:
        return f"{count:.1f}" if count < 9.95 else f"{count:.0f}"
    return f"{count / 1e3:.1f}k" if count < 9950 else f"{count / 1e3:.0f}k"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on minutes, from two hours on hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}{THIN}{unit}"
    return f"{seconds:.1f}{THIN}s"


_FORMS: dict[str, Callable[[Any], str]] = {
    "percent": percent,
    "significant": significant,
    "brief": brief,
    "plain": "{:g}".format,
    "millionths": millionths,
    "integer": lambda value: f"{value:,}",
    "size": EngFormatter("B", places=2, sep=THIN),
    "duration": duration,
    "times": lambda value: f"{value:.2f}×",
    "signed": lambda share: f"{'+' if share >= 0 else '−'}{percent(abs(share))}",
}
FORMATS = {name: partial(shown, form=form) for name, form in _FORMS.items()}
