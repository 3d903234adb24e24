from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from reid.workflows.report.charts import ChartMaker, Line, number_text, thinned

NAN = math.nan


def test_a_chart_takes_its_colours_from_the_page() -> None:
    svg = str(ChartMaker().lines([Line([1, 2], [3, 4]), Line([1, 2], [5, 6])], "epoch"))
    tree = ElementTree.fromstring(svg)
    assert tree.attrib["class"] == "chart"
    assert "width" not in tree.attrib  # it gets its width from the page
    assert "var(--c0)" in svg
    assert "var(--c1)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "font-family" not in svg
    assert not list(tree.iter("style"))  # it would apply to the whole page


def test_dots_show_their_values_and_gaps_stay() -> None:
    svg = ChartMaker().lines([Line([1, 2, 3], [0.25, NAN, 0.75])], "epoch")
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["1: 0.25", "3: 0.75"]
    long = [float(i) for i in range(100)]
    assert "<title>" not in ChartMaker().lines([Line(long, long)], "step")


def test_charts_of_a_page_share_neither_ids_nor_lines() -> None:
    maker = ChartMaker()
    one = maker.lines([Line([1, 2], [3, 4])], "epoch", reference=3.5)
    other = maker.lines([Line([1, 2], [3, 4])], "epoch", reference=3.5)
    ids = [re.findall(r' id="(.*?)"', svg) for svg in (one, other)]
    assert ids[0]
    assert not {*ids[0]} & {*ids[1]}
    for svg, known in zip((one, other), ids, strict=True):
        assert {*re.findall(r'#([\w-]+)[)"]', svg)} == {*known}
    assert one.replace("chart0-", "") == other.replace("chart1-", "")


def test_axes_follow_the_values_of_each_chart() -> None:
    maker = ChartMaker()
    maker.lines([Line([1, 1000], [1, 5000])], "step")
    maker.histogram([[0.5]], "%")
    tree = ElementTree.fromstring(maker.lines([Line([1, 3], [0, 1])], "epoch"))
    texts = {element.text for element in tree.iter("text")}
    assert {"1", "2", "3"} <= texts
    assert not {"1,000", "5,000", "100"} & texts


@pytest.mark.parametrize("lines", [[Line([], [])], [Line([1, 2], [NAN, NAN])], [Line([5], [1e30])]])
def test_lines_without_values_are_drawn_as_none(lines: list[Line]) -> None:
    ElementTree.fromstring(ChartMaker().lines(lines, "epoch"))


def test_a_histogram_counts_all_values() -> None:
    values = [[0.1, 0.5, 1.0, 1.0, 1.0], []]
    svg = ChartMaker().histogram(values, "average precision, %", bins=4)
    tree = ElementTree.fromstring(svg)
    (outline,) = [path for path in tree.iter("path") if "var(--c0)" in path.attrib["style"]]
    places = re.findall(r"[ML] ([\d.]+) ([\d.]+)", outline.attrib["d"])
    floor, tops = float(places[0][1]), [float(y) for _, y in places[1:-1:2]]
    heights = [floor - top for top in tops]
    assert heights[1] == 0
    assert heights[0] == heights[2] == pytest.approx(heights[3] / 3, rel=1e-4)


def test_thinning_keeps_means_and_ends() -> None:
    line = Line([*range(1000)], [float(i) for i in range(1000)])
    assert thinned(line, 1000) is line
    thin = thinned(line, 10)
    assert len(thin.x) == 10
    assert thin.y[0] == thin.x[0] == 49.5
    assert thin.y[-1] == 949.5
    assert math.isnan(thinned(Line([1, 2, 3], [NAN, NAN, 1]), 1 + 1).y[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12344, "0.1234"), (1234567, "1,234,567"), (3, "3"), (1e12, "1e+12"), (-1500, "-1,500")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text
