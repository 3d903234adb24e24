"""The section of docs/benchmarks.md that a run on a GPU fills in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reid.files import write_text
from reid.workflows.gpu_check.page import cell_text, columns, facts, machine_of

BEGIN = "<!-- gpu_check: begin -->"
END = "<!-- gpu_check: end -->"
EMPTY = """\
No GPU has been measured yet: none has been available since the check was written. On a machine with a
GPU, `make gpu-check` takes six minutes; then `python tools/gpu_check.py --docs
logs/gpu_check/gpu_check.json` writes the measurements here.
"""  # noqa: E501


class DocsError(ValueError):
    """The results or the page cannot be used; the message names the file and the reason."""


def write_docs(results_file: Path, page_file: Path) -> None:
    """Puts the results of a run on a GPU between the two marks of a page.

    Args:
        results_file: The JSON file of the run.
        page_file: docs/benchmarks.md.

    Raises:
        DocsError: The results are not of a GPU or not of this program, or the marks are missing.
        OutputError: The page cannot be written.
    """
    try:
        results = json.loads(results_file.read_text("utf-8"))
        text = section_text(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DocsError):
            raise DocsError(f"{results_file}: {error}") from None
        raise DocsError(
            f"{results_file}: expected the gpu_check.json of a run ({type(error).__name__}: "
            f"{error})"
        ) from error
    write_text(page_file, replaced(page_file.read_text("utf-8"), text, str(page_file)))


def replaced(page: str, text: str, name: str) -> str:
    """Puts `text` between the two marks of a page.

    Raises:
        DocsError: The page does not have each mark once, in this order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise DocsError(f"{name}: expected one line {BEGIN} and one line {END} after it")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def section_text(results: Mapping[str, Any]) -> str:
    """The results of a run on a GPU, in Markdown.

    Raises:
        DocsError: The run was on a CPU, or at toy sizes.
    """
    if results["device"] != "cuda" or results["sizes"] != "full":
        raise DocsError(
            f"expected a run on a GPU at full size, got device {results['device']!r} and "
            f"{results['sizes']} sizes"
        )
    checks = [check for found in results["sections"] for check in found["checks"]]
    wrong = [check for check in checks if not check["right"]]
    lines = [
        f"`python tools/gpu_check.py --minutes {results['minutes']:g}` on "
        f"{machine_of(results).get('device', 'a GPU')}; {facts(results)}.",
        "",
        f"{len(checks) - len(wrong)} of {len(checks)} checks hold"
        + (". Those that do not:" if wrong else "."),
        "",
    ]
    if wrong:
        lines += [*(f"- {check['what']} ({check['seen']})" for check in wrong), ""]
    rest = [found for found in results["sections"] if found["status"] not in ("done", "wrong")]
    if rest:
        lines += ["Not run, or not to the end:", ""]
        lines += [f"- {one['title']}: {one['status']} {one['why']}".rstrip() for one in rest]
        lines += [""]
    if results["aims"]:
        rows = [
            {"aim": aim["what"], "wanted": aim["aim"], "seen": aim["seen"],
             "reached": aim["reached"]}
            for aim in results["aims"]
        ]  # fmt: skip
        lines += markdown_table(rows)
    for found in results["sections"]:
        if found["group"] != "fast":
            continue
        for title, rows in found["tables"].items():
            lines += [f"**{title}**", "", *markdown_table(rows)]
        lines += [line for note in found["notes"] if found["tables"] for line in (note, "")]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table with an empty line after it."""
    names = columns(rows)
    body = [[cell_text(row.get(name)) for name in names] for row in rows]
    texts = [names, ["---"] * len(names), *body]
    lines = ((cell.replace("|", "\\|") for cell in cells) for cells in texts)
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]
