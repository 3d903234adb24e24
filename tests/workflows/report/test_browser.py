"""The report in a real browser: light and dark, narrow and wide, with hostile names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid.workflows.report import write_report

NARROW, WIDE = (390, 844), (1280, 900)
EVIL = "<script>pwned=1</script>\"'><img src=x onerror=pwned=1>"
LONG = "a_name_without_any_place_to_break_" * 8


@pytest.fixture
def page(make_run: Callable[..., Path]) -> Path:
    """A page of two runs, which has every kind of section, with hostile names."""
    name = EVIL.replace("/", "_")
    runs = [
        make_run(name, images="{}" + name, test_set=EVIL, loss=EVIL),
        make_run("other", test_set=LONG, loss=LONG, CLUSTERER={"NAME": LONG}),
    ]
    return write_report(runs, runs[1] / "page.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_page_is_readable(browser: Any, page: Path, size: tuple[int, int], scheme: str) -> None:
    browser.open(page, size, scheme)
    browser.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert browser.complaints() == []
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    assert browser.poor_contrast() == []
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(17, 20, 24)") == (scheme == "dark")
    broken = "[...document.images].filter((i) => !(i.complete && i.naturalWidth)).length"
    assert browser.value(broken) == 0
    assert browser.value("document.images.length") > 10
    cut = """[...document.querySelectorAll('svg.chart text')].filter((text) => {
      const [a, b] = [text.getBoundingClientRect(), text.closest('svg').getBoundingClientRect()];
      return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
    }).map((text) => text.textContent)"""
    assert browser.value(cut) == []


def test_a_page_loads_nothing_and_runs_nothing(browser: Any, page: Path) -> None:
    browser.open(page, WIDE, "light")
    assert [url for url in browser.addresses() if not url.startswith("data:")] == [
        page.resolve().as_uri()
    ]
    assert browser.value("typeof pwned") == "undefined"
    assert browser.value("document.scripts.length") == 0
    assert EVIL.replace("/", "_") in browser.value("document.body.innerText")


def test_the_page_itself_stops_scripts(browser: Any, page: Path) -> None:
    """If a hostile name got into the page, the page's policy would stop it."""
    text = page.read_text("utf-8")
    page.write_text(
        text.replace("<main>", "<main><script>pwned=1</script><img src=x onerror=pwned=1>")
    )
    browser.open(page, WIDE, "light")
    assert browser.value("typeof pwned") == "undefined"
    assert len(browser.complaints()) >= 1
