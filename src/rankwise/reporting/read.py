"""What a report is made of: result folders, and folders that `rankwise compare` and `rankwise explore` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.contest import RESULTS
from rankwise.errors import RankwiseError
from rankwise.exploring import EXPLORED
from rankwise.integration.result import EVALUATION, REPORT, SPECTRA, SPEED
from rankwise.reporting.inspect import inspect


@dataclass(frozen=True)
class Result:
    """One compressed model. spectra: as of `thinned_spectra`, empty where they were not kept; evaluation, speed: what `evaluate`
    and `bench` added."""

    name: str
    report: Mapping[str, Any]
    spectra: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Contest:
    """The rows of `hold_contest`."""

    name: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Explored:
    """What `explore` found."""

    name: str
    found: Mapping[str, Any]


def read_folder(folder: Path) -> Result | Contest | Explored:
    """What is in `folder`. Raises `RankwiseError` where none of them is."""
    name = folder.resolve().name
    if (folder / EXPLORED).exists():
        return Explored(name, _read(folder / EXPLORED))
    if (folder / RESULTS).exists():
        rows = _read(folder / RESULTS)
        if not rows:
            raise RankwiseError(f"{folder / RESULTS} holds no result yet: go on with rankwise compare")
        return Contest(name, rows)
    if not (folder / REPORT).exists():
        raise RankwiseError(
            f"{folder} has neither {REPORT} (of rankwise compress) nor {RESULTS} (of rankwise compare) nor {EXPLORED} (of "
            "rankwise explore)"
        )
    report = _read(folder / REPORT)
    if "shapes" not in report:  # written by 0.1.0
        report["shapes"] = {row["matrix"]: [row["out_features"], row["in_features"]] for row in inspect(folder)}
    spectra, evaluation, speed = (
        _read(folder / name) if (folder / name).exists() else None for name in (SPECTRA, EVALUATION, SPEED)
    )
    return Result(name, report, spectra or {}, evaluation, speed)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RankwiseError(f"{file} cannot be read: {error}") from None
