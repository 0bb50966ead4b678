"""Every report, whichever way it came about, is as the schema says: in Python and on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter

import rankwise

FAST: dict[str, Any] = {"allocation": "mask-fisher", "samples": 10, "length": 32}
Make = Callable[[Path, Path, Path], rankwise.Compressed]
MAKES: dict[str, Make] = {
    "in memory": lambda model, text, out: rankwise.compress(model, 0.25, calibration=text, output=out, **FAST),
    "block by block": lambda model, text, out: rankwise.compress(
        model, 0.25, calibration=text, output=out, memory="4GB", allocation="uniform", samples=10, length=32
    ),
    "in bits": lambda model, text, out: rankwise.compress(
        model, target_bytes=150_000, bits="mixed", calibration=text, output=out, samples=10, length=32
    ),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_report_is_as_the_schema_says(make: Make, llama: Path, story: Path, tmp_path: Path) -> None:
    fits(make(llama, story, tmp_path / "small").report)
    fits(json.loads((tmp_path / "small" / "report.json").read_text()))


def test_a_refined_one_too(small_llama: Path, llama: Path, story: Path, tmp_path: Path) -> None:
    result = rankwise.refine(small_llama, llama, calibration=story, samples=10, length=32, output=tmp_path / "refined")
    fits(result.report)
    assert result.report["version"] == 1
    assert result.report["refined_on"] == str(story)


def test_the_schema_is_printed_and_explains_each_field() -> None:
    printed = subprocess.run([sys.executable, "-m", "rankwise.schema"], capture_output=True, check=True, text=True)
    schema = json.loads(printed.stdout)
    assert all(field["description"] for field in schema["properties"].values())
    assert set(schema["properties"]) == set(get_type_hints(rankwise.Report))


def fits(report: Mapping[str, Any]) -> None:
    """The report has the fields of the schema, of the types there, and no others."""
    TypeAdapter(rankwise.Report).validate_python(dict(report), strict=True)
    assert set(report) <= set(get_type_hints(rankwise.Report))
