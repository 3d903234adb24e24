"""The page in a real browser: by keyboard alone, light and dark, narrow and wide."""

from __future__ import annotations

from typing import Any

import pytest

NARROW, WIDE = (390, 844), (1280, 900)
READY = "!state.busy && state.question !== undefined && document.title.startsWith('Review of')"
CUT = "document.documentElement.scrollWidth"


def show(browser: Any, served: Any, view: str, size: tuple[int, int], scheme: str) -> None:
    browser.open("about:blank", size, scheme)
    browser.open(f"{served.url}#{view}", size, scheme)
    browser.until(READY)
    browser.until("[...document.images].every((i) => i.complete)")


def loaded(browser: Any) -> list[int]:
    """Widths of the pictures that are in sight."""
    widths: list[int] = browser.value(
        "[...document.images].filter((i) => i.getBoundingClientRect().top < innerHeight)"
        ".map((i) => i.naturalWidth)"
    )
    return widths


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_page_is_readable(
    browser: Any, served: Any, size: tuple[int, int], scheme: str
) -> None:
    for view in ("clusters", "random", "doubtful"):
        show(browser, served, view, size, scheme)
        assert browser.complaints() == []
        assert browser.value(CUT) <= size[0]
        assert browser.poor_contrast() == []
        assert loaded(browser)
        assert all(loaded(browser))
        small = """[...document.querySelectorAll('button')].filter((b) => {
          const box = b.getBoundingClientRect(); return box.height < 24 || box.width < 24;
        }).map((b) => b.textContent)"""
        assert browser.value(small) == []
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(17, 20, 24)") == (scheme == "dark")


def test_everything_has_a_name(browser: Any, served: Any) -> None:
    for view in ("clusters", "random"):
        show(browser, served, view, WIDE, "light")
        nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in ("button", "image", "toolbar")
        ]
        assert len(named) > 20
        assert all(name.strip() for _, name in named)
        assert browser.value("document.documentElement.lang") == "en"


def test_keys_alone_answer(browser: Any, served: Any) -> None:
    show(browser, served, "clusters", WIDE, "light")
    answers = served.session.journal.answers
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    browser.press("Space")
    assert browser.value("state.marked.size") == 1
    assert browser.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.press("s")
    browser.until(f"{READY} && document.getElementById('counts').textContent.startsWith('1 ')")
    assert [len(answer.marked) for answer in answers] == [1]
    assert answers[0].same
    assert answers[0].different
    browser.press("1")
    assert browser.value("state.chosen.size") == 1
    browser.press("m")
    browser.until(READY + " && document.getElementById('counts').textContent.startsWith('2 ')")
    assert answers[1].verdict == "merge"
    for key in ("n", "j", "d"):
        before = len(answers)
        browser.press(key)
        browser.until(
            f"{READY} && document.getElementById('counts').textContent.startsWith('{before + 1} ')"
        )
    assert [answer.verdict for answer in answers[2:]] == ["next", "junk", "different"]
    for left in (4, 3):
        browser.press("u")
        browser.until(
            f"{READY} && document.getElementById('counts').textContent.startsWith('{left} ')"
        )
    assert "Undone: junk" in browser.value("document.getElementById('status').textContent")
    browser.press("p")  # nothing is marked: refused in words, and the question stays
    browser.until("document.getElementById('status').className === 'bad'")
    assert len(answers) == 3
    browser.press("w")
    browser.until("document.getElementById('written').textContent.includes('Written to')")
    assert served.session.labels.path.exists()
    errors = [text for text in browser.complaints() if "400" not in text]
    assert errors == []  # the browser itself logs the refusal


def test_figures_come_with_answers(browser: Any, served: Any) -> None:
    show(browser, served, "random", WIDE, "light")
    for number in range(1, 13):
        if not browser.value("state.marked.size"):  # known matches are marked beforehand
            browser.press("ArrowRight")
            browser.press("Space")
        browser.press("s")
        browser.until(
            f"{READY} && document.getElementById('counts').textContent.startsWith('{number} ')"
        )
    browser.until(
        "document.getElementById('random').textContent.includes('12 randomly sampled images')"
    )
    assert "between" in browser.value("document.getElementById('random').textContent")
    browser.until("document.querySelectorAll('#chart svg').length")
    assert browser.poor_contrast() == []
    assert browser.complaints() == []


def test_it_asks_this_machine_alone_and_names_stay_text(browser: Any, served: Any) -> None:
    records = served.session.source.records
    evil = "<img src=x onerror=pwned=1>\"'"
    for record in records:
        record.extra["camera"] = evil
    show(browser, served, "clusters", WIDE, "light")
    assert browser.value("typeof pwned") == "undefined"
    assert evil in browser.value("document.querySelector('#images .name').textContent")
    addresses = [url for url in browser.addresses() if not url.startswith("data:")]
    assert addresses
    assert all(url.startswith(served.url) for url in addresses)
    assert browser.value("document.cookie") == ""
    script = (
        "document.body.append(Object.assign(document.createElement('script'), {text: 'pwned=1'}))"
    )
    browser.value(script)
    assert browser.value("typeof pwned") == "undefined"  # the policy stops what is not a file


def test_an_end_of_the_tool_is_told(browser: Any, served: Any) -> None:
    show(browser, served, "sure", WIDE, "light")
    with_other_token = served.url.replace("T0ken", "Other")
    browser.value(f"history.replaceState(null, '', {with_other_token!r})")
    browser.press("s")
    browser.until("document.getElementById('status').className === 'bad'")
    assert "open the link" in browser.value("document.getElementById('status').textContent")
