"""The page's charts: drawn by matplotlib as SVG whose colours are the page's CSS variables, so that they follow its theme.

Each is small enough to be read on a phone as it is; its text stays text, its marks have titles for pointer and screen reader.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from rankwise.plain import shown
from rankwise.reporting.grid import Place

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK, QUIET, LINE = "#010101", "#010102", "#010103"  # stand for the variables of the same name
SERIES = [f"#0102{i:02x}" for i in range(8)]
MARKERS = "osD^vPX*"
SYMBOLS = "●■◆▲▼✚✖★"  # the same, as text for legends
VARIABLES = {INK: "var(--ink)", QUIET: "var(--quiet)", LINE: "var(--line)"}
VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)}
DEPTHS = [f"#0103{i:02x}" for i in range(101)]
VARIABLES |= {colour: f"color-mix(in oklab, var(--late) {i}%, var(--early))" for i, colour in enumerate(DEPTHS)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "path.simplify": False,
}


def depth(share: float) -> str:
    """A colour for a layer `share` of the way through the model, 0 to 1."""
    return DEPTHS[round(100 * share)]


class Chart:
    """One pair of axes on its way to SVG; `title` names what is drawn as `gid`."""

    def __init__(self, axes: Axes) -> None:
        self.axes, self.titles, self.points, self.svg = axes, dict[str, str](), dict[str, int](), Markup()

    def titled(self, text: str, point: int | None = None) -> str:
        """A new gid whose element will have this title; with a `point`, the page lets one choose it by pointer and keyboard."""
        gid = f"mark-{len(self.titles)}"
        self.titles[gid] = text
        if point is not None:
            self.points[gid] = point
        return gid

    def log_scale(self) -> None:
        """The y axis logarithmic, its labels plain numbers."""
        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        wide = high / low > 30
        self.axes.yaxis.set_major_locator(LogLocator(numticks=6) if wide else LogLocator(subs=(1, 2, 5)))
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
        self.axes.yaxis.set_minor_locator(NullLocator())  # of its ticks, which show nothing, most of a chart's time


def _plain(value: float) -> str:
    """Without an exponent, down to a hundred thousandth."""
    return f"{value:g}" if not 1e-5 <= value < 1e-3 else f"{value:.5f}".rstrip("0")


@contextmanager
def chart(name: str, description: str, width: float = 400, height: float = 270) -> Iterator[Chart]:
    """Axes to draw on, of this size in CSS pixels; on leaving, the chart's `svg` is there. `name` is unique in its page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72))
        drawing = Chart(figure.subplots())
        yield drawing
        ConstrainedLayoutEngine().execute(figure)  # not the figure's own, for which saving draws everything twice
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing.svg = _inline(buffer.getvalue(), name, description, drawing.titles, drawing.points)


def _inline(svg: bytes, name: str, description: str, titles: Mapping[str, str], points: Mapping[str, int]) -> Markup:
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    for element in root.iter():
        if (point := points.get(element.get("id", ""))) is not None:
            element.attrib |= {"data-point": str(point), "role": "button", "tabindex": "-1"}
        text = titles.get(element.get("id", ""))
        if text is not None:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
        element.attrib |= {key: _in_page(key, value, name) for key, value in element.attrib.items()}
        if element.tag == f"{{{SVG}}}style":
            element.text = _in_page("style", element.text or "", name)
    root.attrib |= {"role": "group" if points else "img", "aria-label": description, "class": "chart"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _in_page(attribute: str, value: str, name: str) -> str:
    """The attribute's value with the page's colours, and with ids, and what refers to them, that are the chart's alone."""
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == f"{{{XLINK}}}href":
        return value.replace("#", f"#{name}-")
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), value)


def paid_and_cost(name: str, points: Sequence[tuple[str, str, int, float]], kinds: Sequence[str]) -> Markup:
    """A mark for each (matrix, kind, bytes saved, KL)."""
    floor = min((kl for *_, kl in points if kl > 0), default=1e-9)
    with chart(name, "what each matrix paid and what it cost: bytes saved against KL") as drawing:
        axes = drawing.axes
        for matrix, kind, saved, kl in points:
            series = kinds.index(kind) % len(SERIES)
            gid = drawing.titled(f"{matrix}: {saved:,} bytes saved, KL {kl:.2g}")
            axes.plot([saved], [max(kl, floor)], MARKERS[series], color=SERIES[series], markersize=6, alpha=0.85, gid=gid, mew=0)
        axes.set(xlabel="bytes saved", ylabel="KL alone, nats per token")
        axes.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_xlim(left=0)
        drawing.log_scale()
    return drawing.svg


def spectra_of_kind(name: str, kind: str, spectra: Sequence[tuple[Place, float, Mapping[str, Any]]]) -> Markup:
    """The spectra of one type of matrix, a line per (place, depth, thinned spectrum), each over its first; a dot at the rank."""
    with chart(name, f"singular values of {kind}, one line per layer, a dot where it is cut", 300, 200) as drawing:
        axes = drawing.axes
        largest = 1
        for place, share, spectrum in spectra:
            at, values = zip(*spectrum["points"], strict=True)
            first = values[0] or 1.0
            relative = [max(value / first, 1e-6) for value in values]
            rank, largest = spectrum["rank"], max(largest, spectrum["components"])
            cut = "dense" if rank is None else f"rank {rank} of {spectrum['components']}"
            gid = drawing.titled(f"{_layer(place)}: {cut}")
            style = {"linestyle": (0, (2, 2)), "linewidth": 1} if rank is None else {"linewidth": 1.5}
            axes.plot(at, relative, color=depth(share), gid=gid, **style)
            if rank is not None:
                gid = drawing.titled(f"{_layer(place)}: {cut}")
                axes.plot([rank], [relative[at.index(rank)]], "o", color=depth(share), markersize=5.5, gid=gid, mew=0)
        axes.set_xlim(0, largest)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        drawing.log_scale()
    return drawing.svg


def _layer(place: Place) -> str:
    return f"layer {place.layer}" if place.layer else place.kind


def steps_chart(name: str, history: Sequence[Mapping[str, Any]]) -> Markup:
    """A bar per named step, as long as its KL."""
    with chart(name, "KL after each step of choosing the ranks", 400, 70 + 22 * len(history)) as drawing:
        axes = drawing.axes
        best = min(record["kl"] for record in history)
        for i, record in enumerate(history):
            gid = drawing.titled(f"{record['step']}: KL {record['kl']:.5f}")
            axes.barh(i, record["kl"], height=0.6, color=SERIES[0], alpha=1 if record["kl"] == best else 0.45)[0].set_gid(gid)
            axes.annotate(f"{record['kl']:.4g}", (record["kl"], i), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(history)), [record["step"] for record in history])
        axes.set_xlim(0, 1.2 * max(record["kl"] for record in history))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("KL on the selection text, nats per token")
    return drawing.svg


def curve(name: str, label: str, steps: Sequence[float], values: Sequence[float]) -> Markup:
    """A line: `label` over the training steps."""
    with chart(name, f"{label} over the training steps", 300, 190) as drawing:
        drawing.axes.plot(
            steps,
            values,
            color=SERIES[0],
            linewidth=1.6,
            gid=drawing.titled(f"{label}: {shown(values[-1], '{:.4g}'.format)} at last"),
        )
        drawing.axes.set(xlabel="step", ylabel=label)
        drawing.axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        drawing.axes.yaxis.set_major_locator(MaxNLocator(5))
    return drawing.svg


def quality_against_rate(name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """KL over the rate, a line of (rate, KL) per label."""
    floor = min((kl for points in series.values() for _, kl in points if kl > 0), default=1e-9)
    with chart(name, "KL against the rate", 400, 290) as drawing:
        axes = drawing.axes
        for i, (label, points) in enumerate(series.items()):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            rates, kls = zip(*sorted(points), strict=True)
            axes.plot(rates, [max(kl, floor) for kl in kls], "-" if i < len(SERIES) else "--", color=colour, linewidth=1.4)
            for rate, kl in zip(rates, kls, strict=True):
                gid = drawing.titled(f"{label}, rate {rate:.3g}: KL {kl:.4g}")
                axes.plot([rate], [max(kl, floor)], marker, color=colour, markersize=6, mew=0, gid=gid)
        axes.set(xlabel="rate (fraction of parameters removed)", ylabel="KL(original || compressed), nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        drawing.log_scale()
    return drawing.svg


class Measured(NamedTuple):
    """A point of a curve: its index among all, where it stands, its interval upwards, and all of it in words."""

    point: int
    x: float
    y: float
    interval: Sequence[float] | None
    title: str


def cost_against(
    name: str, x: tuple[str, Formatter], y: str, series: Mapping[str, Sequence[Measured]], rings: Collection[int]
) -> Markup:
    """A line through measured points per label, in their order; each point can be chosen, on the first of its lines.
    x, y: what the axes are, x with how it is written. rings: points with a ring around them."""
    floor, drawn = min((p.y for points in series.values() for p in points if p.y > 0), default=1e-9), set[int]()
    with chart(name, f"{y} against {x[0]}: a line for each way", 400, 300) as drawing:
        axes = drawing.axes
        for i, points in enumerate(series.values()):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            axes.plot([p.x for p in points], [max(p.y, floor) for p in points], color=colour, linewidth=1.4)
            for p in (p for p in points if p.point not in drawn):
                at = max(p.y, floor)
                drawn.add(p.point)
                if p.interval:
                    axes.plot([p.x, p.x], [max(bound, floor / 2) for bound in p.interval], color=colour, linewidth=1, alpha=0.6)
                if p.point in rings:
                    axes.plot([p.x], [at], "o", color=colour, markersize=12, mew=1.2, fillstyle="none")
                axes.plot([p.x], [at], marker, color=colour, markersize=7, mew=0, gid=drawing.titled(p.title, p.point))
        axes.set(xlabel=x[0], ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(x[1])
        drawing.log_scale()
    return drawing.svg
