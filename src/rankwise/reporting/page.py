"""The report: one HTML file that needs nothing else, not even a network.

Every figure of a report stands in the page as an element with a `data-path` into the JSON embedded at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from rankwise.errors import RankwiseError
from rankwise.integration.result import PAGE
from rankwise.plain import plain, to_json
from rankwise.reporting.explored import explored_view
from rankwise.reporting.numbers import FORMATS
from rankwise.reporting.read import Contest, Explored, Result, read_folder
from rankwise.reporting.view import contest_view, overview, result_view

PERPLEXITIES = {"reference_perplexity", "perplexity"}  # null only where it is infinite: JSON has no number for that


def report(folders: Sequence[str | Path], output: str | Path) -> None:
    """Write the page of these folders, of results, contests and what was explored, to one file. Raises `RankwiseError` for a
    folder that has none of these, and where the file cannot be written."""
    found = [read_folder(Path(folder)) for folder in folders]
    results, contests = [r for r in found if isinstance(r, Result)], [c for c in found if isinstance(c, Contest)]
    _write(Path(output), page_of(results, contests, [e for e in found if isinstance(e, Explored)]))


def refuse_no_page(folder: Path) -> None:
    """Raises `RankwiseError` for a folder that is no result, which has no page."""
    if not isinstance(read_folder(folder), Result):
        raise RankwiseError(f"{folder} has no report to add to: give a folder that rankwise compress wrote")


def add_to_page(folder: Path, name: str, measured: Mapping[str, Any]) -> None:
    """Keep an evaluation or the measured speed of a result in its folder, as `name`, and write its page anew."""
    _write(folder / name, to_json(measured, indent=1) + "\n")
    report([folder], folder / PAGE)


def _write(output: Path, text: str) -> None:
    temporary = output.with_name(f"{output.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        raise RankwiseError(f"cannot write {output}: {error.strerror}") from None


def page_of(results: Sequence[Result], contests: Sequence[Contest] = (), explored: Sequence[Explored] = ()) -> str:
    """The HTML of some results, contests and explored models, at least one of any."""
    results = [Result(r.name, *map(plain, (r.report, r.spectra, r.evaluation, r.speed))) for r in results]
    contests = [Contest(contest.name, plain(contest.rows)) for contest in contests]
    data = {
        "results": [result.report for result in results],
        "evaluations": [result.evaluation for result in results],
        "speeds": [result.speed for result in results],
        "contests": [contest.rows for contest in contests],
        "explored": [each.found for each in explored],
    }
    return _template().render(
        figure=functools.partial(_figure, data),
        title=_title(results, [*explored, *contests]),
        results=[result_view(number, result) for number, result in enumerate(results)],
        contests=[contest_view(number, contest) for number, contest in enumerate(contests)],
        explored=[explored_view(number, each) for number, each in enumerate(explored)],
        overview=overview(results, contests),
        data=data,
    )


@functools.cache
def _template() -> Template:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["source"] = lambda name: Markup((here / name).read_text())
    environment.filters |= FORMATS | {"pointed": lambda key: key.replace("~", "~0").replace("/", "~1")}
    return environment.get_template("page.html.j2")


def _title(results: Sequence[Result], others: Sequence[Contest | Explored]) -> str:
    if others:
        return others[0].name
    return results[0].name if len(results) == 1 else f"{len(results)} results side by side"


def _figure(data: Any, path: str, style: str) -> Markup:
    """The value at `path` ("/results/0/kl", a JSON pointer) as text, marked with where it comes from."""
    keys = [key.replace("~1", "/").replace("~0", "~") for key in path.split("/")[1:]]
    value = functools.reduce(lambda node, key: node[int(key) if isinstance(node, Sequence) else key], keys, data)
    text = "infinite" if value is None and PERPLEXITIES & set(keys[-2:]) else FORMATS[style](value)
    return Markup(f'<span data-path="{escape(path)}" data-value="{to_json(value)}">{text}</span>')
