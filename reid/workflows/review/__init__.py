"""A page in the browser to judge a run's clusters and label its images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from reid.files import say
from reid.locks import FolderInUse, locked
from reid.registry import ConfigError
from reid.workflows.extras import require_packages

logger = logging.getLogger(__name__)

FOLDER, LABELS = "review", "labels.csv"
_NEEDS = ("starlette", "uvicorn")


def review(
    run: Path,
    *,
    folder: Path | None = None,
    labels: Path | None = None,
    test_share: float = 0.5,
    address: str = "127.0.0.1",
    port: int = 8765,
    write_only: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Serves the page until it is stopped, then writes the list of labels.

    Args:
        run: Folder of a run.
        folder: Where answers, features and thumbnails are kept; None: `review` in the run's.
        labels: The list to write, for the dataset `CSV`; None: labels.csv in `folder`.
        test_share: Share of the labelled persons that are for tests; see `LabelledSplits`.
        address: To serve at.
        port: To serve at; 0 takes any that is free.
        write_only: Writes the list and ends, without a page.
        overrides: KEY VALUE pairs that win over the run's config.

    Raises:
        ConfigError: starlette or uvicorn is missing, the folder holds no run, a setting is wrong,
            or another process reviews in `folder`.
        DataError: The images or the answers on disk are not what was expected.
        WeightsError: The weights do not fit.
        OutputError: A file cannot be written, or `labels` is there and is another's.
    """
    if not write_only:
        require_packages("review", "serve", _NEEDS)
    if not 0 <= test_share <= 1:
        raise ConfigError(f"--test-share: expected 0 to 1, got {test_share}")
    if not run.is_dir():  # before a folder is made in it
        raise ConfigError(f"{run}: is no folder; expected the output folder of a run")
    folder = run / FOLDER if folder is None else folder
    labels = folder / LABELS if labels is None else labels
    try:
        with locked(folder):
            _review(run, folder, labels, test_share, address, port, write_only, overrides)
    except FolderInUse as error:
        raise ConfigError(f"--folder: {error}") from None


def _review(
    run: Path, folder: Path, labels: Path, test_share: float, address: str, port: int,
    write_only: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    from reid.workflows.review.session import ReviewSession
    from reid.workflows.review.source import open_source

    source = open_source(run, folder, overrides)
    session = ReviewSession(source, folder, labels, test_share)
    try:
        if not write_only:
            from reid.workflows.review.server import serve

            def announce(link: str) -> None:
                say(
                    f"{len(source.records):,} images, clusters from {source.clusters_from}\n"
                    f"Answers are stored in {session.journal.path}\n"
                    f"Open {link}\nCtrl-C ends, and writes {labels}"
                )

            serve(session, address, port, announce)
        if not session.journal.answers:
            say("There are no answers yet, so no list is written")
            return
        written = session.write()
        say(f"Written to {written['path']}: {written['summary']}")
        if written["note"]:
            logger.warning("%s", written["note"])
        for purpose, command in written["commands"]:
            say(f"\n{purpose}\n  {command}")
    finally:
        session.close()
