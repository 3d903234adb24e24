"""A page about a run, or about several side by side, made of the files that runs leave."""

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
"""The page's file in the folder of a run."""

logger = logging.getLogger(__name__)


def write_report(runs: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Writes a page of HTML that needs no other file and no network, of about 3 MB at most.

    It shows what the runs' files tell; what is missing there is said in words. Nothing in the files
    is executed, and nothing of them is taken for HTML.

    Args:
        runs: Folder of a run, or several, which are shown side by side.
        output: The file to write; None: report.html in the run's folder, and of several runs in
            the current one.

    Returns:
        The file.

    Raises:
        DataError: A folder is none of a run, or there is none.
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

    The run is worth more than its page: where the page cannot be made, a warning says why.

    Args:
        run: Its folder.
    """
    if not distributed.is_main():
        return
    try:
        write_report(run)
    except (DataError, OSError) as error:
        logger.warning("no %s: %s", REPORT, error)
