"""The support table names tests that there are, and every test of the neighbours is in it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "support.md").read_text()


def defined(file: str) -> set[str]:
    return set(re.findall(r"^def test_(\w+)", (TESTS / f"test_{file}.py").read_text(), re.MULTILINE))


def test_every_row_names_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and line.count("|") == 5 and "| test |" not in line]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"\| (works|note|not yet) \|", row), row
        names = re.findall(r"`(?:(\w+)::|…)(\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert names, row
        file = names[0][0]
        for other, test in names:
            file = other or file
            assert test in defined(file), f"{file}::{test}"


def test_no_test_is_missing() -> None:
    for file in ("transformers", "peft", "export", "vllm"):
        assert {test for test in defined(file) if f"{test}`" not in TABLE} == set(), file
