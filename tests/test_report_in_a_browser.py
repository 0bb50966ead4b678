"""The page in a real Chromium, where there is one: it renders, complains of nothing, asks for nothing and fits a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankwise import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


DIFFERING = """() => {
    const data = JSON.parse(document.querySelector("#data").textContent);
    const at = (path) => path.split("/").slice(1).reduce((node, key) => node[key.replaceAll("~1", "/")], data);
    return [...document.querySelectorAll("[data-path]")].filter(e => Number(e.dataset.value) !== at(e.dataset.path)).length;
}"""


@contextmanager
def opened(browser: Any, file: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page, which complains of nothing, asks for nothing, fits the width and says what its JSON says."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(DIFFERING) == 0
    yield page
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert complaints == []
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_renders(browser: Any, small_llama: Path, tmp_path: Path, width: int, scheme: str) -> None:
    report([small_llama], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", width, scheme) as page:
        _is_the_report(page, small_llama, width)


def _is_the_report(page: Any, small_llama: Path, width: int) -> None:
    told = json.loads((small_llama / "report.json").read_text())
    assert page.evaluate("JSON.parse(document.querySelector('#data').textContent).results") == [told]
    cells = page.eval_on_selector_all("[data-matrix]", "cells => cells.map(cell => [cell.dataset.matrix, cell.textContent])")
    assert dict(cells) == {name: "dense" if rank is None else str(rank) for name, rank in told["ranks"].items()}
    charts = page.eval_on_selector_all("svg.chart", "charts => charts.map(chart => chart.getBoundingClientRect().width)")
    assert charts
    assert all(100 < wide <= width for wide in charts)

    name, rank = next((name, rank) for name, rank in told["ranks"].items() if rank is not None)
    page.click(f'[data-matrix="{name}"]')
    readout = page.text_content(".readout")
    assert name in readout
    assert f"rank {rank}" in readout


@pytest.mark.parametrize("width", [1400, 820, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_explored_model_is_chosen_from_by_keyboard(browser: Any, explored: Path, width: int, scheme: str) -> None:
    points = json.loads((explored / "explored.json").read_text())["points"]
    with opened(browser, explored / "report.html", width, scheme) as page:

        def card() -> str:
            (text,) = page.eval_on_selector_all("[data-card]:not([hidden])", "cards => cards.map(card => card.innerText)")
            return str(text)

        page.focus("figure:not([hidden]) [data-point][tabindex='0']")
        seen = set()
        for _ in points:
            page.keyboard.press("ArrowRight")
            seen.add(card())
            at = int(page.evaluate("document.activeElement.dataset.point"))
            assert points[at]["label"] in card()
            assert (points[at]["command"] or "No command") in card()
        assert len(seen) == len(points) - 1  # the original is no point of the chart
        page.focus(".budget:not([hidden]) input")
        page.keyboard.press("End")
        assert points[0]["label"] in card()
        page.keyboard.press("Home")
        smallest = min((point for point in points if point["command"]), key=lambda point: point["bytes"])
        assert smallest["label"] in card()
        page.check("[data-switch=x][value=speedup]")
        page.check("[data-switch=y][value=perplexity]")
        (chart,) = page.eval_on_selector_all("figure[data-shown]:not([hidden]) svg", "all => all.map(one => one.ariaLabel)")
        assert chart.startswith("perplexity against times as fast")
        page.focus(".heat td[tabindex='0']")
        page.keyboard.press("ArrowDown")
        assert "for the next 1" in page.text_content(".readout")
