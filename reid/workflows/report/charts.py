"""Charts as SVG with the page's colours, so that one file works in light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

NUM_COLOURS = 8
"""The page defines `--c0` and so on up to this number; then dashes tell lines apart."""
_SIZE = (340, 190)  # width, height in pixels
_AREA = (0.155, 0.17, 0.805, 0.79)  # of the plot: left, bottom, width, height as shares
_REFERENCE = re.compile(r"#([\w-]+)")
_DASHES = ("-", "--", ":", "-.")
_MOST_MARKED = 40  # points of a line that get a dot with its value
# Matplotlib writes these; the page's variables take their places.
_INK, _GRID, _COLOURS = "#010101", "#020202", tuple(f"#03030{i}" for i in range(NUM_COLOURS))
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)},
}
_FORMAT: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "reid", "font.size": 10, "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    "xtick.color": _GRID, "ytick.color": _GRID, "grid.color": _GRID, "axes.linewidth": 1.0,
    "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


class Line(NamedTuple):
    """A line of a chart; values that are not finite leave a gap.

    Attributes:
        x: Ascending positions.
        y: One value for each position.
    """

    x: Sequence[float]
    y: Sequence[float]


class ChartMaker:
    """Draws the charts of a page; reuses the same axes for each, which saves time."""

    def __init__(self) -> None:
        self._count = 0
        with mpl.rc_context(_FORMAT):
            # an SVG has 72 pixels an inch
            self._figure = Figure(figsize=(_SIZE[0] / 72, _SIZE[1] / 72))
            self._figure.patch.set_visible(False)
            self._axes = self._figure.add_axes(_AREA)
            self._axes.patch.set_visible(False)
            self._axes.spines[["top", "right"]].set_visible(False)
            self._axes.grid(axis="y")
            form = FuncFormatter(lambda value, _: number_text(value))
            for axis, most, whole in ((self._axes.xaxis, 6, True), (self._axes.yaxis, 5, False)):
                axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole))
                axis.set_major_formatter(form)

    def lines(self, lines: Sequence[Line], label: str, reference: float | None = None) -> Markup:
        """Draws lines over epochs or steps; line i has the page's colour i.

        A short line has a dot for each point; the dot shows its value under the pointer.

        Args:
            lines: One quantity of each run. An empty line stands for a run without it.
            label: Label of the horizontal axis.
            reference: Position of a dashed horizontal line.
        """
        with mpl.rc_context(_FORMAT):
            for number, line in enumerate(lines):
                marked = sum(map(math.isfinite, line.y)) <= _MOST_MARKED
                self._axes.plot(
                    line.x,
                    line.y,
                    **_stroke(number),
                    marker="o" if marked else "",
                    markersize=4,
                    gid=f"line{number}",
                )
            if reference is not None:
                self._axes.axhline(reference, color=_INK, linestyle="--", linewidth=1.2)
            self._axes.relim()
            self._axes.autoscale(True)
            tree = self._draw(label)
        for number, line in enumerate(lines):
            _tell_values(tree, f"line{number}", line)
        return self._finish(tree)

    def histogram(self, values: Sequence[Sequence[float]], label: str, bins: int = 20) -> Markup:
        """Draws a histogram of values from 0 to 1, in percent; kind i has colour i.

        Args:
            values: The values of each kind.
            label: Label of the horizontal axis, whose numbers are percent.
            bins: Number of bins of equal width.
        """
        edges = [100 * i / bins for i in range(bins + 1)]
        highest = 0.0
        with mpl.rc_context(_FORMAT):
            for number, kind in enumerate(values):
                counts = [0] * bins
                for value in kind:
                    counts[min(bins - 1, max(0, int(value * bins)))] += 1
                shares = [100 * count / max(1, len(kind)) for count in counts]
                highest = max(highest, *shares)
                if len(values) == 1:
                    colour = _COLOURS[number % NUM_COLOURS]
                    self._axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3)
                self._axes.stairs(shares, edges, **_stroke(number))
            self._axes.set_xlim(0, 100)
            self._axes.set_ylim(0, 1.05 * highest or 1)
            tree = self._draw(label)
        return self._finish(tree)

    def _draw(self, label: str) -> ElementTree.Element:
        """Returns the chart as SVG with the page's colours and font, and clears the axes."""
        self._axes.set_xlabel(label, loc="right", labelpad=1, parse_math=False)
        buffer = io.StringIO()
        FigureCanvasSVG(self._figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
        for artist in (*self._axes.lines, *self._axes.patches):
            artist.remove()
        tree = ElementTree.fromstring(buffer.getvalue())
        for element in tree.iter():
            element.tag = element.tag.partition("}")[2] or element.tag
            for name in list(element.attrib):
                if "}" in name:  # xlink:href
                    element.set(name.partition("}")[2], element.attrib.pop(name))
            if "style" in element.attrib:
                element.set("style", _page_style(element.attrib["style"]))
        for parent in list(tree.iter()):
            for child in list(parent):
                if child.tag in ("metadata", "style"):
                    parent.remove(child)
        tree.attrib = {"viewBox": tree.attrib["viewBox"], "class": "chart", "aria-hidden": "true"}
        return tree

    def _finish(self, tree: ElementTree.Element) -> Markup:
        """The SVG as text for HTML; ids that are referred to are unique on the page."""
        key = f"chart{self._count}"
        self._count += 1
        used = set()
        for element in tree.iter():
            for value in element.attrib.values():
                used.update(_REFERENCE.findall(value))
        for element in tree.iter():
            if element.attrib.get("id") in used:
                element.set("id", f"{key}-{element.attrib['id']}")
            else:
                element.attrib.pop("id", None)
            for name, value in element.attrib.items():
                element.set(name, _REFERENCE.sub(rf"#{key}-\1", value))
        text = ElementTree.tostring(tree, "unicode")
        return Markup(re.sub(r"(?<=>)\s+(?=<)", "", text))


def thinned(line: Line, most: int) -> Line:
    """Thins a line to at most `most` points, each the mean of the same number of neighbours."""
    if len(line.x) <= most:
        return line
    edges = [round(i * len(line.x) / most) for i in range(most + 1)]
    x, y = [], []
    for start, end in pairwise(edges):
        finite = [value for value in line.y[start:end] if math.isfinite(value)]
        x.append(sum(line.x[start:end]) / (end - start))
        y.append(sum(finite) / len(finite) if finite else math.nan)
    return Line(x, y)


def number_text(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e7 else f"{value:.4g}"


def percent_text(share: float) -> str:
    """A share from 0 to 1 in percent, with one decimal and without the sign."""
    return f"{100 * share:.1f}" if math.isfinite(share) else "unknown"


def _stroke(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // NUM_COLOURS % len(_DASHES)]
    return {"color": _COLOURS[number % NUM_COLOURS], "linestyle": dashes, "linewidth": 1.6}


def _page_style(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, variable)
    kept = []
    for item in style.split(";"):
        name, _, value = item.strip().partition(":")
        if name == "font":  # `font: 10px 'DejaVu Sans', ...`
            size = re.search(r"[\d.]+px", value)
            kept.append(f"font-size: {size[0] if size else '10px'}")
        elif name and name != "font-family":
            kept.append(f"{name}: {value.strip()}")
    return "; ".join(kept)


def _tell_values(tree: ElementTree.Element, gid: str, line: Line) -> None:
    """Adds titles to the dots of a line; a browser shows them under the pointer."""
    group = next((element for element in tree.iter("g") if element.get("id") == gid), None)
    shown = [point for point in zip(*line, strict=True) if math.isfinite(point[1])]
    dots = [] if group is None else list(group.iter("use"))
    if len(dots) == len(shown):
        for dot, (x, y) in zip(dots, shown, strict=True):
            ElementTree.SubElement(dot, "title").text = f"{number_text(x)}: {number_text(y)}"
