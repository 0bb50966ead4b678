"""What `rankwise explore` found: what the page says of it, and a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import EngFormatter, FuncFormatter
from rich import box
from rich.table import Table

from rankwise.evaluation.frontier import curves_of
from rankwise.plain import shown
from rankwise.reporting import figures
from rankwise.reporting.figures import Measured
from rankwise.reporting.numbers import FORMATS, THIN, brief
from rankwise.reporting.read import Explored
from rankwise.reporting.terminal import plain_console
from rankwise.reporting.view import laid_out, legend

SIZE, SPEED = ("bytes", "size of the weights"), ("speedup", "times as fast, predicted")
KL, PERPLEXITY = ("kl", "KL, nats per token"), ("perplexity", "perplexity")
FORMS = {"bytes": EngFormatter("B", sep=" "), "speedup": FuncFormatter(lambda value, _: f"{value:g}×")}
Point = Mapping[str, Any]


def explored_view(number: int, explored: Explored) -> dict[str, Any]:
    """Of what was explored that is at `number` in the page's data."""
    found, identity = explored.found, f"explored-{number}"
    points = found["points"]
    knees = found["answers"]["knees"].items()
    curves = curves_of(points)
    axes = [(x, y) for x in (SIZE, SPEED) for y in (KL, PERPLEXITY)]
    charts = {(x[0], y[0]): _chart(identity, found, x, y) for x, y in axes}
    priced = [(i, point) for i, point in enumerate(points) if point.get("next_per_cent")]
    return {
        "id": identity,
        "number": number,
        "path": f"/explored/{number}",
        "base": found["base_model"].rstrip("/").rsplit("/", 1)[-1],
        "found": found,
        "charts": {key: drawn for key, drawn in charts.items() if drawn},
        "curves": list(curves),
        "knees": [(name, i) for name, i in knees if not i or points[i]["series"] == name],  # each once
        "others": list(points[0]["texts"])[1:],
        "legend": legend(curves),
        "beside": _beside(points, found["answers"]),
        "maps": [(i, _map(point, f"/explored/{number}/points/{i}")) for i, point in priced],
    }


def _beside(points: Sequence[Point], found: Mapping[str, Any]) -> dict[str, int | None]:
    """What each other curve has at the size of the best knee; None where it does not get so small."""
    best = points[found["best_knee"]]
    row = next(row for row in found["within"] if row["bytes"] == best["bytes"])
    return {name: index for name, index in row["points"].items() if name not in best["curves"]}


def _chart(identity: str, found: Mapping[str, Any], x: tuple[str, str], y: tuple[str, str]) -> Markup | None:
    """One measure against another; None where nothing is known of one of them."""
    points = found["points"]
    measured = {
        index: Measured(index, point[x[0]], point[y[0]], point["intervals"].get(y[0]), named(point))
        for index, point in enumerate(points)
        if index and point[x[0]] is not None and point[y[0]] is not None
    }
    ordered = {name: sorted(of, key=lambda i: points[i]["bytes"]) for name, of in curves_of(points).items()}
    curves = {name: [measured[i] for i in of if i in measured] for name, of in ordered.items()}
    name, rings = f"{identity}-{x[0]}-{y[0]}", set(found["answers"]["knees"].values())
    return figures.cost_against(name, (x[1], FORMS[x[0]]), y[1], curves, rings) if measured else None


def named(point: Point) -> str:
    """A point in a line."""
    size, kl = FORMATS["size"](point["bytes"]), shown(point["kl"], brief)
    return f"{point['series']}, {point['label']}: {size}, KL {kl}"


def _map(point: Point, path: str) -> dict[str, Any]:
    """The heat map of what the next per cent of each matrix costs: the darker, the dearer."""
    prices = point["next_per_cent"]
    levels = [math.log(price) for price in prices.values() if price > 0] or [0.0]
    low, high = min(levels), max(levels)

    def cell(names: Sequence[str]) -> dict[str, Any]:
        price = sum(prices[name] for name in names) / len(names)
        share = (math.log(price) - low) / (high - low) if price > 0 and high > low else 0.0
        matrix = names[0] if len(names) == 1 else None
        what = matrix or f"{len(names)} experts, each"
        return {
            "matrix": matrix,
            "dense": False,
            "share": min(max(share, 0.0), 1.0),
            "path": matrix and f"{path}/next_per_cent/{_pointed(matrix)}",
            "text": FORMATS["millionths"](price),
            "note": f"{what}: {brief(price)} nats per token for the next 1{THIN}%",
        }

    return laid_out(prices, cell)


def _pointed(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def print_explored(found: Mapping[str, Any]) -> None:
    """Every point in a line, then the knees."""
    points, console = found["points"], plain_console()
    columns = f"on {found['text']}", "", "bytes", "of all", "KL", "perplexity", "decodes"
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for point in points:
        table.add_row(
            point["series"],
            point["label"],
            f"{point['bytes']:,}",
            f"{point['share']:.1%}",
            shown(point["kl"], "{:.4f}".format),
            "" if point["reference_perplexity"] is None else shown(point["perplexity"], "{:.3f}".format),
            "" if point["speedup"] is None else f"{point['speedup']:.2f}x",
        )
    console.print(table)
    for series, index in found["answers"]["knees"].items():
        console.print(f"{series}: {_up_to(points[index]) if index else 'no step is worth its bytes'}")
    for note in found["notes"]:
        console.print(note)


def _up_to(point: Point) -> str:
    made = f": {point['command']}" if point["command"] else ""
    kl = shown(point["kl"], "{:.4f}".format)
    return f"worth its bytes up to {point['label']}, {point['bytes']:,} bytes, KL {kl}{made}"
