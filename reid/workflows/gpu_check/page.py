"""The page: a single HTML file without other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #1a7f37; --wrong: #c62828; --dim: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.6rem 0 .3rem; font-size: 1rem; } p { margin: .4rem 0; }
.dim { color: var(--dim); } .right { color: var(--right); } .wrong { color: var(--wrong); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
pre { overflow-x: auto; background: #8881; padding: .6rem; font-size: .85rem; }
"""
_WORDS = {
    "done": ("right", "done"),
    "wrong": ("wrong", "WRONG"),
    "failed": ("wrong", "FAILED"),
    "cut short": ("dim", "cut short"),
    "out of time": ("wrong", "out of time"),
    "left out": ("dim", "left out"),
    "not run": ("dim", "not run"),
    "running": ("dim", "running"),
    "interrupted": ("wrong", "interrupted"),
}
_GROUPS = {"machine": "Where", "right": "Right", "fast": "Fast"}


def page(results: Mapping[str, Any]) -> str:
    """Renders the results as HTML.

    Args:
        results: The content of the JSON file.
    """
    machine = machine_of(results)
    body = [
        f"<h1>GPU check: {escape(machine.get('device', results['device']))}</h1>",
        f"<p class='dim'>{escape(facts(results))}</p>",
        f"<p>{_verdict(results)}</p>",
    ]
    if results["sizes"] != "full":
        body.append(
            "<p><strong>Toy sizes</strong>: this run only shows that every section works. Its "
            "times say nothing about a GPU.</p>"
        )
    for name, sections in results["missing"].items():
        body.append(
            f"<p class='wrong'>{escape(name)} is not installed: without it "
            f"{escape(', '.join(sections))} cannot run.</p>"
        )
    if results["aims"]:
        rows = [
            {"aim": aim["what"], "wanted": aim["aim"], "seen": aim["seen"],
             "": "reached" if aim["reached"] else "missed"}
            for aim in results["aims"]
        ]  # fmt: skip
        body += ["<h2>Aims</h2>", _table(rows)]
    body += ["<h2>Sections</h2>", _overview(results["sections"])]
    for group, title in _GROUPS.items():
        found = [section for section in results["sections"] if section["group"] == group]
        if found:
            body += [f"<h2>{title}</h2>", *(part for one in found for part in _section(one))]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>GPU check</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def machine_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Device, versions and other facts about the machine, as far as they are known."""
    for section in results["sections"]:
        if section["name"] == "machine":
            return {key: str(value) for key, value in section["numbers"].items()}
    return {}


def facts(results: Mapping[str, Any]) -> str:
    """Machine, date and versions, in one line."""
    machine = machine_of(results)
    parts = [results["started"].replace("T", " ").replace("+00:00", " UTC")]
    parts += [
        f"{label} {machine[key]}"
        for key, label in (
            ("torch", "torch"), ("cuda", "CUDA"), ("driver", "driver"), ("timm", "timm"),
            ("python", "Python"), ("cpu_cores", "CPU cores:"),
        )
        if machine.get(key) not in (None, "None")
    ]  # fmt: skip
    if results["commit"]:
        parts.append(f"commit {results['commit']}")
    parts.append(f"{results['seconds']:.0f} s of {60 * results['minutes']:.0f} s")
    return ", ".join(parts)


def _verdict(results: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    checks = [check for found in results["sections"] for check in found["checks"]]
    wrong = sum(not check["right"] for check in checks)
    bad = [one["name"] for one in results["sections"] if one["status"] in ("failed", "out of time")]
    text = (
        f"<strong class='wrong'>{wrong} of {len(checks)} checks do not hold.</strong>"
        if wrong
        else f"<strong class='right'>All {len(checks)} checks hold.</strong>"
        if checks
        else "No check has been made."
    )
    if bad:
        text += f" <strong class='wrong'>Not finished: {escape(', '.join(bad))}.</strong>"
    return text


def _overview(sections: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for found in sections:
        kind, word = _WORDS[found["status"]]
        checks = found["checks"]
        right = sum(check["right"] for check in checks)
        rows.append(
            f"<tr><td><a href='#{escape(found['name'])}'>{escape(found['title'])}</a></td>"
            f"<td class='{kind}'>{word}</td>"
            f"<td class='number'>{f'{right} of {len(checks)}' if checks else ''}</td>"
            f"<td class='number'>{found['seconds']:.1f}</td>"
            f"<td class='number dim'>{found['limit']:.0f}</td>"
            f"<td class='dim'>{escape(found['why'])}</td></tr>"
        )
    head = (
        "<tr><th>section</th><th></th><th class='number'>checks that hold</th>"
        "<th class='number'>seconds</th><th class='number'>at most</th><th></th></tr>"
    )
    return f"<div class='scroll'><table>{head}{''.join(rows)}</table></div>"


def _section(found: Mapping[str, Any]) -> Iterable[str]:
    kind, word = _WORDS[found["status"]]
    why = f": {escape(found['why'])}" if found["why"] else ""
    yield (
        f"<h3 id='{escape(found['name'])}'>{escape(found['title'])} "
        f"<span class='{kind}'>({word}{why})</span></h3>"
    )
    if found["checks"]:
        yield "<ul>"
        for check in found["checks"]:
            mark = "<b class='right'>✓</b>" if check["right"] else "<b class='wrong'>✗ WRONG</b>"
            seen = f" <span class='dim'>{escape(check['seen'])}</span>" if check["seen"] else ""
            yield f"<li>{mark} {escape(check['what'])}{seen}</li>"
        yield "</ul>"
    if found["group"] == "machine" and found["numbers"]:
        yield _table([{"": name, " ": value} for name, value in found["numbers"].items()])
    for title, rows in found["tables"].items():
        yield _table(rows, title)
    for note in found["notes"]:
        yield f"<p class='dim'>{escape(note)}</p>"
    for cut in found["cuts"]:
        yield f"<p class='dim'>Left out: {escape(cut)}</p>"
    if found["error"]:
        yield f"<details><summary>what went wrong</summary><pre>{escape(found['error'])}</pre></details>"  # noqa: E501


def _table(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    names = columns(rows)
    numeric = {
        name for name in names
        if all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
    }  # fmt: skip

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if name in numeric else ''}>{escape(value)}</{tag}>"
            for name, value in zip(names, values, strict=True)
        )

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    body = "".join(
        f"<tr>{cells('td', [cell_text(row.get(name)) for name in names])}</tr>" for row in rows
    )
    return f"<div class='scroll'><table>{caption}<tr>{cells('th', names)}</tr>{body}</table></div>"


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table, in the order in which they first appear in its rows."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell_text(value: Any) -> str:
    """A cell as text: numbers with three digits, thousands separated.

    >>> [cell_text(value) for value in (12345.6, 0.012345, 3, True, None, "fp16")]
    ['12,346', '0.0123', '3', 'yes', '', 'fp16']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
