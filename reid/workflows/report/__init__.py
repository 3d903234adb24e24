"""Writes a page about one run, or about several side by side, from the files of the runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from reid import distributed
from reid.files import write_text
from reid.structures import DataError
from reid.workflows.report.page import render
from reid.workflows.report.reading import read_run

REPORT = "report.html"
"""Name of the page's file in the folder of a run."""

logger = logging.getLogger(__name__)


def write_report(runs: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Writes an HTML page of at most about 3 MB that needs no other file and no network.

    The page shows the content of the runs' files and says what is missing. Nothing in the files is
    executed, and nothing in them becomes HTML.

    Args:
        runs: The folders of one or several runs; several are shown side by side.
        output: The file to write; None: report.html in the run's folder, or in the current folder
            for several runs.

    Returns:
        The file.

    Raises:
        DataError: A folder does not hold a run, or no folder is given.
        OutputError: The page cannot be written.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    if not folders:
        raise DataError("expected the folder of a run, got none")
    if output is None:
        output = folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    write_text(output, render([read_run(folder) for folder in folders]))
    return output


def report_at_end(run: Path) -> None:
    """Writes the page of a run that has just ended, on the main process.

    If the page cannot be made, a warning says why: the run must not fail because of it.

    Args:
        run: The run's folder.
    """
    if not distributed.is_main():
        return
    try:
        write_report(run)
    except (DataError, OSError) as error:
        logger.warning("no %s: %s", REPORT, error)
