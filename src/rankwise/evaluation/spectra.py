"""Spectra thinned out to what a picture needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rankwise.decomposition.solver import Decomposition
from rankwise.masks.layers import Masks, is_whole

POINTS = 48


def thinned_spectra(decompositions: Mapping[str, Decomposition], masks: Masks) -> dict[str, dict[str, Any]]:
    """By matrix: at most about 48 `points` [component counted from 1, singular value], the rank's among them; the number of
    `components`; the `rank`, or None for dense; and how many of the kept ones lie `beyond` the first that many."""
    spectra = {}
    for name, decomposition in decompositions.items():
        values, mask = decomposition.spectrum.double().cpu(), masks[name]
        kept = None if mask is None or is_whole(mask) else mask.nonzero().squeeze(-1)
        rank = None if kept is None else len(kept)
        at = set(torch.linspace(0, len(values) - 1, min(POINTS, len(values))).round().long().tolist())
        at |= {rank - 1} if rank else set()
        spectra[name] = {
            "components": len(values),
            "rank": rank,
            "beyond": 0 if kept is None or rank is None else int((kept >= rank).sum()),
            "points": [[i + 1, float(f"{values[i]:.4g}")] for i in sorted(at)],
        }
    return spectra
