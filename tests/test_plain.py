"""What JSON has no number for: null in every file and on standard output, words on the page and the terminal."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.evaluation import compare
from rankwise.plain import plain, shown, to_json

Run = Callable[..., Any]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


def strict(text: str) -> Any:
    """As every reader of JSON takes it; Python's own would take Infinity and NaN too."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(values)
def test_every_value_is_json(value: Any) -> None:
    assert strict(to_json(value)) == strict(to_json(value, indent=1)) == plain(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text() | st.none())
def test_what_json_can_say_is_left_alone(value: Any) -> None:
    assert json.loads(to_json({"a": [value]})) == {"a": [value]}


@pytest.mark.parametrize(
    ("value", "text"), [(1.25, "1.2"), (math.inf, "infinite"), (-math.inf, "-infinite"), (math.nan, "–"), (None, "–")]
)
def test_shown(value: float | None, text: str) -> None:
    assert shown(value, "{:.1f}".format) == text


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compressed model is infinitely wrong, and its KL no number."""
    summary = compare.summary_of

    def spoiled(rows: torch.Tensor, *given: Any) -> compare.Comparison:
        rows[:, 1], rows[:, 4] = math.nan, 1e6
        return summary(rows, *given)

    monkeypatch.setattr(compare, "summary_of", spoiled)


@pytest.mark.page
@pytest.mark.usefixtures("hopeless")
def test_a_hopeless_model(rankwise: Run, llama: Path, story: Path, tmp_path: Path) -> None:
    text, size = ["--text", story], ["--samples", 12, "--length", 32]
    small, many = tmp_path / "small", tmp_path / "many"
    compress = ["compress", llama, "-o", small, "--calibration", story, "--allocation", "uniform", *size]
    told = rankwise(*compress)
    assert told.code == 0, told.err
    assert "infinite" in told.out
    assert "inf " not in told.out
    assert "nan" not in told.out
    assert "| infinite |" in (small / "README.md").read_text()
    report = strict((small / "report.json").read_text())
    assert report["kl"] is report["perplexity"] is None
    assert report["reference_perplexity"] > 1

    evaluate = [
        "evaluate",
        small,
        "--reference",
        llama,
        *text,
        *text[:1],
        "stdlib:held-out",
        *size,
        "--cache",
        tmp_path / "cache",
    ]
    assert "infinite" in rankwise(*evaluate).out
    evaluated = rankwise(*evaluate, "--add-to-report", "--json")
    assert evaluated.code == 0, evaluated.err
    assert strict(evaluated.out)["perplexity"] is None
    assert strict((small / "evaluation.json").read_text()) == strict(evaluated.out)

    contest = ["compare", llama, *text, "--calibration", story, "--rates", "0.2,0.3", "-o", many, "--judge-samples", 2, *size]
    held = rankwise(*contest, "--allocations", "uniform,energy", "--json")
    assert held.code == 0, held.err
    assert strict((many / "results.json").read_text()) == strict(held.out)

    again = rankwise("report", small, many, "-o", tmp_path / "page.html")
    assert again.code == 0, again.err
    for page in (small / "report.html", many / "report.html", tmp_path / "page.html"):
        html = page.read_text()
        strict(html.partition('id="data">')[2].partition("</script>")[0])
        assert "nan" not in html.partition("<main>")[2].partition('id="data"')[0].replace("nance", "")
    assert 'perplexity" data-value="null">infinite<' in (small / "report.html").read_text()
    assert "–" in (many / "report.html").read_text()
    overwritten = rankwise(*compress, "--overwrite", "--json")
    assert strict(overwritten.out)["kl"] is None


def test_an_older_folder_with_infinity_in_it_is_read(rankwise: Run, small_llama: Path, tmp_path: Path) -> None:
    old = shutil.copytree(small_llama, tmp_path / "old")
    report = json.loads((old / "report.json").read_text()) | {"perplexity": math.inf}
    (old / "report.json").write_text(json.dumps(report))
    assert rankwise("report", old, "-o", tmp_path / "page.html").code == 0
    assert "infinite" in (tmp_path / "page.html").read_text()
