"""Renders the page from the sections of its runs, with a template that escapes everything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from reid.workflows.report.charts import NUM_COLOURS, ChartMaker
from reid.workflows.report.comparison import different_settings, different_surroundings
from reid.workflows.report.curves import curve_groups, precision_chart
from reid.workflows.report.run_files import RunFiles
from reid.workflows.report.sections import run_section

_TEMPLATE = "report.html.j2"
_PICTURE_BYTES = 2_400_000
"""For all runs together, so that a page has about 3 MB."""
_ESCAPED_BYTE = range(0xDC80, 0xDD00)  # how Python keeps a byte of a name that is no UTF-8


def render(runs: Sequence[RunFiles]) -> str:
    """Renders an HTML page that needs no other file, no network and no script.

    Args:
        runs: One or more runs, from left to right.
    """
    titles = _titles(runs)
    size = _PICTURE_BYTES // len(runs)
    sections = [run_section(run, title, size) for run, title in zip(runs, titles, strict=True)]
    several = len(runs) > 1
    settings, bookkeeping = different_settings(runs) if several else ([], [])
    test_sets = dict.fromkeys(details.test_set for run in runs for details in run.details)
    maker = ChartMaker()
    charts = [(test_set, precision_chart(runs, test_set, maker)) for test_set in test_sets]
    return _template().render(
        sections=sections,
        several=several,
        num_colours=NUM_COLOURS,
        settings=settings,
        bookkeeping=bookkeeping,
        surroundings=different_surroundings(runs) if several else [],
        curves=curve_groups(runs, maker),
        precision_charts=[(name, chart) for name, chart in charts if chart is not None],
        test_sets=list(dict.fromkeys(row.test_set for part in sections for row in part.results)),
        counted=any(any(row.counts) for part in sections for row in part.results),
        metrics=list(
            dict.fromkeys(name for part in sections for row in part.results for name in row.numbers)
        ),
    )


def visible(value: object) -> object:
    """Escapes control characters, direction marks and broken bytes in a text.

    The template applies this to everything it shows, because names of files may contain anything.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else _written_out(letter)
        for letter in value
    )


@lru_cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)


def _written_out(letter: str) -> str:
    if ord(letter) in _ESCAPED_BYTE:
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return ascii(letter)[1:-1]


def _titles(runs: Sequence[RunFiles]) -> list[str]:
    """Unique names of the runs: the folder's name, else its path, else the path with a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names
