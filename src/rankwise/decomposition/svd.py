"""Plain SVD: every input and output counts alike (Eckart and Young 1936). Needs no text."""

from __future__ import annotations

from rankwise.calibration.moments import Moments
from rankwise.decomposition.solver import Root

NEEDS: frozenset[str] = frozenset()


def roots(moments: Moments) -> tuple[Root | None, Root | None]:
    """Identity on both sides."""
    return None, None
