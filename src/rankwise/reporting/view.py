"""What the page says of a result, and of a contest, beyond their own figures: charts, heat maps, what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from rankwise.allocation.allocator import spelling
from rankwise.layers.lowrank import PairLinear
from rankwise.layers.matrices import Shape
from rankwise.reporting import figures
from rankwise.reporting.command import command_of
from rankwise.reporting.contest import by_method
from rankwise.reporting.evaluation import blind_tasks
from rankwise.reporting.grid import Place, places, short_names
from rankwise.reporting.numbers import brief, percent
from rankwise.reporting.read import Contest, Result

LINES = 24  # of a chart of spectra, at most


@dataclass(frozen=True)
class Matrix:
    """One matrix of a result: its shape in the original, and what is left of that, its rank (None: dense), the KL with it alone
    compressed, where that was measured, and how many of the bits that a number had it has now."""

    name: str
    whole: Shape
    shape: Shape
    rank: int | None
    kl: float | None
    bits: int | None = None
    of_bits: float = 16.0

    @property
    def kept(self) -> float:
        """The fraction of its parameters kept, or where they are written in fewer bits of its bits."""
        share = 1.0 if self.bits is None else self.bits / self.of_bits
        return share * self.shape.parameters(self.rank) / self.whole.dense

    @property
    def removed(self) -> int:
        """The number of its parameters removed."""
        return self.whole.dense - self.shape.parameters(self.rank)

    @property
    def saved(self) -> int:
        """Bytes."""
        return round((1 - self.kept) * self.whole.dense * self.of_bits / 8)

    @property
    def is_narrower(self) -> bool:
        """Whether its MLP has fewer neurons."""
        return self.shape != self.whole

    @property
    def note(self) -> str:
        """All of it in a line."""
        fate = ("stays dense" if self.bits is None else "one matrix") if self.rank is None else f"rank {self.rank}"
        fate += "" if self.bits is None else f", {self.bits} bits a number"
        fate += "" if self.kept == 1 else f", keeps {percent(self.kept)}"
        cost = "" if self.kl is None else f"; alone costs {brief(self.kl)} nats per token"
        sides = f"{self.shape.out_features} × {self.shape.in_features}"
        sides += f" of {self.whole.out_features} × {self.whole.in_features}" if self.is_narrower else ""
        return f"{self.name}: {sides}, {fate}{cost}"


def result_view(number: int, result: Result) -> dict[str, Any]:
    """Of the result that is at `number` in the page's data."""
    report, identity = result.report, f"result-{number}"
    costs = report.get("costs", {}).get("kl", {})
    form = report["recipe"].get("form", PairLinear.form)  # which reports did not tell when there was one
    whole = {name: Shape(m, n, form=form) for name, (m, n) in report["shapes"].items()}
    shapes = whole | {name: Shape(m, n, form=form) for name, (m, n) in report.get("narrowed", {}).items()}
    bits, of_bits = (
        report.get("bits", {}),
        8 * report["bytes"]["linear"]["reference"] / report["parameters"]["linear"]["reference"],
    )
    matrices = [Matrix(m, whole[m], shapes[m], rank, costs.get(m), bits.get(m), of_bits) for m, rank in report["ranks"].items()]
    where = places(report["ranks"])
    history = report.get("history", [])
    named = [record for record in history if isinstance(record.get("step"), str) and record.get("kl") is not None]
    return {
        "id": identity,
        "path": f"/results/{number}",
        "name": result.name,
        "base": report["base_model"].rstrip("/").rsplit("/", 1)[-1],
        "report": report,
        "faster": faster(result),
        "evaluation": result.evaluation,
        "blind": blind_tasks((result.evaluation or {}).get("tasks", {})),
        "evaluation_path": f"/evaluations/{number}",
        "speed": result.speed,
        "speed_path": f"/speeds/{number}",
        "worse": worse(report),
        "smaller": smaller(report),
        "grid": grid(report["ranks"], {m.name: m.kept for m in matrices}, {m.name: m.note for m in matrices}, bits),
        "low_rank": sum(m.rank is not None for m in matrices),
        "dense": sum(m.rank is None and m.bits is None and not m.is_narrower for m in matrices),
        "narrow": len(report.get("neurons", {})),
        "widths": sorted({m.bits for m in matrices if m.bits is not None}),
        "matrices": sorted(matrices, key=lambda m: -(m.kl or 0)),
        "paid": _paid(identity, matrices, where),
        "spectra": _spectra(identity, result.spectra, where),
        "beyond": _beyond(result.spectra),
        "steps": figures.steps_chart(f"{identity}-steps", named) if named else None,
        "curves": _curves(identity, history),
        "samples": [_parted(sample) for sample in report.get("samples", [])],
        "command": command_of(report["base_model"], report["recipe"], result.name) if "recipe" in report else None,
    }


@dataclass(frozen=True)
class Faster:
    """How many times as fast it writes, and how that is known."""

    times: float
    known: Literal["measured", "by this machine's table", "by its bytes"]


def faster(result: Result) -> Faster | None:
    """Decoding at the smallest batch where that was measured, else as the table of a target or the bytes predict; None where
    numbers of few bits are to be unpacked first."""
    decoding = [row for row in (result.speed or {}).get("speed", []) if row["phase"] == "decode" and "speedup" in row]
    if decoding:
        return Faster(decoding[0]["speedup"], "measured")
    if "predicted_speedup" in result.report:
        return Faster(result.report["predicted_speedup"], "by this machine's table")
    if result.report.get("bits"):
        return None
    size = result.report["bytes"]["model"]
    return Faster(size["reference"] / size["compressed"], "by its bytes")


def smaller(report: Mapping[str, Any]) -> float:
    """By what share: of the parameters, or where they are in few bits of the bytes."""
    size = report["bytes"]["model"]
    removed: float = report["achieved_rate"]["model"]
    return 1 - size["compressed"] / size["reference"] if report.get("bits") else removed


def worse(report: Mapping[str, Any]) -> float | None:
    """By what share perplexity has risen, or None for a model that has none."""
    before, after = report["reference_perplexity"], report["perplexity"]
    if before is None:
        return None
    return math.inf if after is None else after / before - 1  # what is infinite is null in JSON


def _paid(identity: str, matrices: Sequence[Matrix], where: Mapping[str, Place]) -> dict[str, Any] | None:
    """What each matrix paid and what it cost: a chart and its legend, where that was measured."""
    points = [(m.name, where[m.name].kind, m.saved, m.kl) for m in matrices if m.kl is not None]
    if not points:
        return None
    kinds = short_names(place.kind for place in where.values())
    paying = {kind for _, kind, _, _ in points}
    keys = [key for key, kind in zip(legend(kinds.values()), kinds, strict=True) if kind in paying]
    chart = figures.paid_and_cost(f"{identity}-paid", points, list(kinds))
    return {"chart": chart, "legend": keys, "sum": sum(kl for *_, kl in points)}


def _beyond(spectra: Mapping[str, Any]) -> float:
    """The share of kept components that are not among the first of their matrix."""
    kept = sum(spectrum["rank"] or 0 for spectrum in spectra.values())
    return sum(spectrum["beyond"] for spectrum in spectra.values()) / max(kept, 1)


def _parted(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with what both texts begin with apart from how they go on."""
    texts = sample["original"], sample["compressed"]
    length = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    original, compressed = (text[length:] for text in texts)
    return {**sample, "same": texts[0][:length], "original": original, "compressed": compressed}


def grid(
    ranks: Mapping[str, int | None], kept: Mapping[str, float], notes: Mapping[str, str], bits: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The heat map: `kinds` (type -> short name) across, `rows` [(layer, cells)] down; a cell is None where there is no matrix.
    All experts of a layer share a cell. bits: of the matrices whose numbers are in few."""
    return laid_out(ranks, lambda names: _cell(names, ranks, kept, notes, bits or {}))


def laid_out(names: Iterable[str], cell: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """`kinds` and `rows` of a heat map, of what `cell` makes of the matrices at one place."""
    cells: dict[Place, list[str]] = {}
    for name, place in places(names).items():
        cells.setdefault(place, []).append(name)
    kinds = short_names(place.kind for place in cells)
    layers = dict.fromkeys(place.layer for place in cells)
    rows = [
        (layer, [cell(cells[place]) if (place := Place(layer, kind)) in cells else None for kind in kinds]) for layer in layers
    ]
    return {"kinds": kinds, "rows": rows}


def _cell(
    names: Sequence[str],
    ranks: Mapping[str, int | None],
    kept: Mapping[str, float],
    notes: Mapping[str, str],
    bits: Mapping[str, int],
) -> dict[str, Any]:
    low = [rank for name in names if (rank := ranks[name]) is not None]
    few = [bits[name] for name in names if name in bits and ranks[name] is None]
    narrow = [round(100 * kept[name]) for name in names if name not in bits and ranks[name] is None and kept[name] < 1]
    share = sum(kept[name] for name in names) / len(names)
    parts = [_range(low), f"{_range(few)} bits" if few else "", f"{_range(narrow)} %" if narrow else ""]
    text = ", ".join(filter(None, parts)) or "dense"
    rest = len(names) - len(low) - len(few) - len(narrow)
    note = notes[names[0]] if len(names) == 1 else f"{len(names)} experts: {text}" + (f", {rest} stay dense" if rest else "")
    dense = not low and not few and not narrow
    return {"matrix": names[0] if len(names) == 1 else None, "dense": dense, "share": share, "text": text, "note": note}


def _range(numbers: Sequence[int]) -> str:
    """The least and the largest, or nothing of none."""
    least, largest = min(numbers, default=""), max(numbers, default="")
    return f"{least}" if least == largest else f"{least}–{largest}"


def legend(labels: Iterable[str]) -> list[dict[str, Any]]:
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
    return [figures.curve(f"{name}-curve-{i}", label, *line) for i, (label, line) in enumerate(lines.items()) if len(line[0]) > 1]


def _label(report: Mapping[str, Any]) -> str:
    """A result's method, as a contest names it."""
    recipe = report.get("recipe", {})
    method = spelling(str(recipe.get("allocation")), recipe.get("preset", "default"))
    return f"{method} on {recipe.get('decomposition')}"


def overview(results: Sequence[Result], contests: Sequence[Contest]) -> dict[str, Any] | None:
    """Quality against rate, where there is more than one point of it."""
    series: dict[str, list[tuple[float, Any]]] = {}
    for result in results:
        series.setdefault(_label(result.report), []).append((result.report["rate"], result.report["kl"]))
    for contest in contests:
        for row in contest.rows:
            series.setdefault(row["method"], []).append((row["rate"], row["kl"]))
    known = {label: [point for point in points if point[1] is not None] for label, points in series.items()}
    series = {label: points for label, points in known.items() if points}
    if sum(map(len, series.values())) < 2:
        return None
    return {"chart": figures.quality_against_rate("overview", series), "legend": legend(series)}


def _kl(row: Mapping[str, Any]) -> float:
    """To find the best by: what could not be measured is the worst."""
    return math.inf if row["kl"] is None else row["kl"]


def contest_view(number: int, contest: Contest) -> dict[str, Any]:
    rates = sorted({row["rate"] for row in contest.rows})
    index = {(row["method"], row["rate"]): i for i, row in enumerate(contest.rows)}
    middle = [row for row in contest.rows if row["rate"] == rates[len(rates) // 2]]
    best = min(middle, key=_kl)
    notes = {m: f"{m}: " + ("stays dense" if r is None else f"rank {r}") for m, r in best["ranks"].items()}
    table = [
        (method, [f"/contests/{number}/{index[method, rate]}/kl" if (method, rate) in index else None for rate in rates])
        for method in by_method(contest.rows)
    ]
    winners = [min((r for r in contest.rows if r["rate"] == rate), key=_kl)["method"] for rate in rates]
    return {
        "id": f"contest-{number}",
        "name": contest.name,
        "rates": rates,
        "table": table,
        "best_paths": [f"/contests/{number}/{index[method, rate]}/kl" for method, rate in zip(winners, rates, strict=True)],
        "best": best,
        "grid": grid(best["ranks"], best["kept"], notes),
    }
