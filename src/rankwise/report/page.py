"""The report: one HTML file that needs nothing else, not even a network.

Every figure of a report stands in the page as an element with a `data-path` into the JSON embedded at its end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rankwise.errors import RankwiseError
from rankwise.layers.matrices import Shape
from rankwise.report import figures
from rankwise.report.command import command_of
from rankwise.report.contest import by_method
from rankwise.report.grid import Place, places, short_names
from rankwise.report.read import Contest, Result, read_folder

LINES = 24  # of a chart of spectra, at most
THIN = "\u202f"  # a narrow space that does not break, before units


def write_page(folders: Sequence[Path], output: Path) -> None:
    """The report of these folders as one file. Raises `RankwiseError` for a folder without results or a file that cannot be."""
    found = [read_folder(folder) for folder in folders]
    page = page_of([r for r in found if isinstance(r, Result)], [c for c in found if isinstance(c, Contest)])
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RankwiseError(f"cannot write {output}: {error.strerror}") from None


def page_of(results: Sequence[Result], contests: Sequence[Contest] = ()) -> str:
    """The HTML of some results and contests, at least one of either."""
    data = {"results": [result.report for result in results], "contests": [contest.rows for contest in contests]}
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"figure": functools.partial(_figure, data), "source": lambda name: Markup((here / name).read_text())}
    environment.filters |= FORMATS
    return environment.get_template("page.html.j2").render(
        title=(results or contests)[0].name,
        results=[_view(number, result) for number, result in enumerate(results)],
        contests=[_contest_view(number, contest) for number, contest in enumerate(contests)],
        overview=_overview(results, contests),
        data=data,
    )


def _figure(data: Any, path: str, style: str) -> Markup:
    """The value at `path` ("/results/0/kl") as text, marked with where it comes from."""
    value = functools.reduce(lambda node, key: node[int(key) if isinstance(node, Sequence) else key], path.split("/")[1:], data)
    return Markup(f'<span data-path="{escape(path)}" data-value="{value!r}">{FORMATS[style](value)}</span>')


def percent(share: float) -> str:
    """0.1968 -> "19.7 %"."""
    digits = 2 if 0.99 < abs(share) < 1 or 0 < abs(share) < 0.001 else 1
    return f"{100 * share:.{digits}f}{THIN}%"


def significant(value: float) -> str:
    """Four significant digits, five from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def brief(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes, in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.3g}{THIN}{unit}"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on minutes, from two hours on hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}{THIN}{unit}"
    return f"{seconds:.1f}{THIN}s"


FORMATS = {
    "percent": percent,
    "significant": significant,
    "brief": brief,
    "integer": lambda value: f"{value:,}",
    "size": size,
    "duration": duration,
    "times": lambda value: f"{value:.2f}×",
    "signed": lambda share: f"{'+' if share >= 0 else '−'}{percent(abs(share))}",
}


def _view(number: int, result: Result) -> dict[str, Any]:
    """What the template says of one result beyond its report."""
    report, name = result.report, f"result-{number}"
    shapes = {matrix: Shape(*shape) for matrix, shape in report["shapes"].items()}
    ranks, costs = report["ranks"], report.get("costs", {}).get("kl", {})
    where = places(ranks)
    kept = {matrix: shapes[matrix].parameters(rank) / shapes[matrix].dense for matrix, rank in ranks.items()}
    removed = {matrix: shapes[matrix].dense - shapes[matrix].parameters(rank) for matrix, rank in ranks.items()}
    notes = {
        matrix: f"{matrix}: {shape.out_features} × {shape.in_features}, "
        + ("stays dense" if ranks[matrix] is None else f"rank {ranks[matrix]}, keeps {percent(kept[matrix])}")
        + (f"; alone costs {brief(costs[matrix])} nats per token" if matrix in costs else "")
        for matrix, shape in shapes.items()
    }
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    rows = [
        {"matrix": m, "shape": shapes[m], "rank": rank, "kept": kept[m], "removed": removed[m], "kl": costs.get(m)}
        for m, rank in ranks.items()
    ]
    history = report.get("history", [])
    named = [record for record in history if isinstance(record.get("step"), str) and "kl" in record]
    return {
        "id": name,
        "path": f"/results/{number}",
        "name": result.name,
        "report": report,
        "faster": faster(report),
        "worse": None if report["perplexity"] is None else report["perplexity"] / report["reference_perplexity"] - 1,
        "grid": grid(ranks, kept, notes),
        "dense": [matrix for matrix, rank in ranks.items() if rank is None],
        "matrices": sorted(rows, key=lambda row: -(row["kl"] or 0)),
        "paid": figures.paid_and_cost(f"{name}-paid", [(m, where[m].kind, removed[m], kl) for m, kl in costs.items()], kinds)
        if costs
        else None,
        "legend": _legend(short_names(kinds).values()),
        "spectra": _spectra(name, result.spectra, where),
        "beyond": sum(s["beyond"] for s in result.spectra.values()) / max(sum(s["rank"] or 0 for s in result.spectra.values()), 1),
        "samples": [_parted(sample) for sample in report.get("samples", [])],
        "steps": figures.steps_chart(f"{name}-steps", named) if named else None,
        "curves": _curves(name, history),
        "command": command_of(report["base_model"], report["recipe"], result.name) if "recipe" in report else None,
        "seconds": sum(report.get("seconds", {}).values()),
    }


def faster(report: Mapping[str, Any]) -> float:
    """How many times as fast: by `speed` (tokens per second of both) where the report has it, else as the bytes predict."""
    if "speed" in report:
        return report["speed"]["compressed"] / report["speed"]["reference"]
    return report["bytes"]["model"]["reference"] / report["bytes"]["model"]["compressed"]


def _parted(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with what both texts begin with apart from how they go on."""
    same = os.path.commonprefix([sample["original"], sample["compressed"]])
    return {**sample, "same": same, **{side: sample[side][len(same) :] for side in ("original", "compressed")}}


def grid(ranks: Mapping[str, int | None], kept: Mapping[str, float], notes: Mapping[str, str]) -> dict[str, Any]:
    """The heat map: `kinds` (type -> short name) across, `rows` [(layer, cells)] down; a cell is None where there is no matrix.
    All experts of a layer share a cell."""
    cells: dict[Place, list[str]] = {}
    for name, place in places(ranks).items():
        cells.setdefault(place, []).append(name)
    kinds = short_names(place.kind for place in cells)
    layers = dict.fromkeys(place.layer for place in cells)
    rows = [
        (layer, [_cell(cells[place], ranks, kept, notes) if (place := Place(layer, kind)) in cells else None for kind in kinds])
        for layer in layers
    ]
    return {"kinds": kinds, "rows": rows}


def _cell(
    names: Sequence[str], ranks: Mapping[str, int | None], kept: Mapping[str, float], notes: Mapping[str, str]
) -> dict[str, Any]:
    low = [rank for name in names if (rank := ranks[name]) is not None]
    share = sum(kept[name] for name in names) / len(names)
    text = "dense" if not low else f"{min(low)}" if min(low) == max(low) else f"{min(low)}–{max(low)}"
    note = notes[names[0]] if len(names) == 1 else f"{len(names)} experts, ranks {text}, {len(names) - len(low)} stay dense"
    return {"matrix": names[0] if len(names) == 1 else None, "dense": not low, "share": share, "text": text, "note": note}


def _legend(labels: Any) -> list[dict[str, Any]]:
    """Symbol, colour and label of each series."""
    return [
        {"symbol": figures.SYMBOLS[i % len(figures.SYMBOLS)], "series": i % len(figures.SERIES), "label": label}
        for i, label in enumerate(labels)
    ]


def _spectra(name: str, spectra: Mapping[str, Any], where: Mapping[str, Place]) -> list[tuple[str, Markup]]:
    """A chart per type of matrix; of many layers or experts evenly chosen ones."""
    layers = list(dict.fromkeys(place.layer for place in where.values()))
    by_kind: dict[str, list[tuple[Place, float, Any]]] = {}
    for matrix, spectrum in spectra.items():
        share = layers.index(where[matrix].layer) / max(len(layers) - 1, 1)
        by_kind.setdefault(where[matrix].kind, []).append((where[matrix], share, spectrum))
    charts = []
    for number, (kind, lines) in enumerate(by_kind.items()):
        some = lines if len(lines) <= LINES else [lines[i * (len(lines) - 1) // (LINES - 1)] for i in range(LINES)]
        charts.append((kind, figures.spectra_of_kind(f"{name}-spectra-{number}", kind, some)))
    return charts


def _curves(name: str, history: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """What was noted at numbered steps, a chart each, and the losses within a named one."""
    numbered = [record for record in history if isinstance(record.get("step"), int)]
    lines = {
        label: ([r["step"] for r in numbered], [r[label] for r in numbered])
        for label in dict.fromkeys(key for record in numbered for key in record if key != "step")
        if all(label in record for record in numbered)
    }
    for record in history:
        if record.get("losses"):
            lines[f"{record['step']}: training KL"] = (list(range(len(record["losses"]))), record["losses"])
    return [
        figures.curve(f"{name}-curve-{i}", label, *line) for i, (label, line) in enumerate(lines.items()) if len(line[0]) > 1
    ]


def _label(report: Mapping[str, Any]) -> str:
    """A result's method, as a contest names it."""
    recipe = report.get("recipe", {})
    preset = recipe.get("preset", "default")
    return f"{recipe.get('allocation')}{'' if preset == 'default' else f':{preset}'} on {recipe.get('decomposition')}"


def _overview(results: Sequence[Result], contests: Sequence[Contest]) -> dict[str, Any] | None:
    """Quality against rate, where there is more than one point of it."""
    series: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        series.setdefault(_label(result.report), []).append((result.report["rate"], result.report["kl"]))
    for contest in contests:
        for row in contest.rows:
            series.setdefault(row["method"], []).append((row["rate"], row["kl"]))
    if sum(map(len, series.values())) < 2:
        return None
    return {"chart": figures.quality_against_rate("overview", series), "legend": _legend(series)}


def _contest_view(number: int, contest: Contest) -> dict[str, Any]:
    rates = sorted({row["rate"] for row in contest.rows})
    index = {(row["method"], row["rate"]): i for i, row in enumerate(contest.rows)}
    middle = [row for row in contest.rows if row["rate"] == rates[len(rates) // 2]]
    best = min(middle, key=lambda row: row["kl"])
    notes = {m: f"{m}: " + ("stays dense" if r is None else f"rank {r}") for m, r in best["ranks"].items()}
    table = [
        (method, [f"/contests/{number}/{index[method, rate]}/kl" if (method, rate) in index else None for rate in rates])
        for method in by_method(contest.rows)
    ]
    winners = [min((r for r in contest.rows if r["rate"] == rate), key=lambda r: r["kl"])["method"] for rate in rates]
    return {
        "id": f"contest-{number}",
        "name": contest.name,
        "rates": rates,
        "table": table,
        "best_paths": [f"/contests/{number}/{index[method, rate]}/kl" for method, rate in zip(winners, rates, strict=True)],
        "best": best,
        "grid": grid(best["ranks"], best["kept"], notes),
    }
