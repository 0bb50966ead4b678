"""The page in a real Chromium, where there is one: it renders, complains of nothing, asks for nothing and fits a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_renders(browser: Any, small_llama: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (small_llama / "report.html").as_uri()
    page.goto(address)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    report = json.loads((small_llama / "report.json").read_text())
    assert page.evaluate("JSON.parse(document.querySelector('#data').textContent).results") == [report]
    differing = """() => {
        const data = JSON.parse(document.querySelector("#data").textContent);
        const at = (path) => path.split("/").slice(1).reduce((node, key) => node[key.replaceAll("~1", "/")], data);
        return [...document.querySelectorAll("[data-path]")].filter(e => Number(e.dataset.value) !== at(e.dataset.path)).length;
    }"""
    assert page.evaluate(differing) == 0
    cells = page.eval_on_selector_all("[data-matrix]", "cells => cells.map(cell => [cell.dataset.matrix, cell.textContent])")
    assert dict(cells) == {name: "dense" if rank is None else str(rank) for name, rank in report["ranks"].items()}
    charts = page.eval_on_selector_all("svg.chart", "charts => charts.map(chart => chart.getBoundingClientRect().width)")
    assert charts
    assert all(100 < wide <= width for wide in charts)

    name, rank = next((name, rank) for name, rank in report["ranks"].items() if rank is not None)
    page.click(f'[data-matrix="{name}"]')
    readout = page.text_content(".readout")
    assert name in readout
    assert f"rank {rank}" in readout
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert complaints == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    page.close()
