"""The history of the figures, stored on disk for the page's curve."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from reid.files import InputError, OutputError, read_json, write_text
from reid.workflows.review.figures import Estimate, LabelledFigures, RandomFigures

logger = logging.getLogger(__name__)

HISTORY = "figures.json"
_MOST = 400


class History:
    """Figures by the number of answers; if its file is lost, only the curve starts again.

    Args:
        folder: Of the review.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / HISTORY
        self._entries: dict[int, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._entries = {int(entry["answers"]): entry for entry in read_json(self._path)}
            except (InputError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s cannot be read (%s): the curve starts again", self._path, error)

    def with_entry(
        self, answers: int, labelled: LabelledFigures, sampled: RandomFigures
    ) -> list[dict[str, Any]]:
        """Adds these figures and returns the whole history, without that of undone answers."""
        entry = {
            "answers": answers,
            "mAP": _numbers(labelled.mAP),
            "rank1": _numbers(labelled.rank1),
            "sampled": _numbers(sampled.best_is_right),
        }
        self._entries = {n: kept for n, kept in self._entries.items() if n < answers}
        self._entries[answers] = entry
        while len(self._entries) > _MOST:  # every other one of the older half
            old = sorted(self._entries)[: _MOST // 2]
            for number in old[1::2]:
                del self._entries[number]
        found = [self._entries[number] for number in sorted(self._entries)]
        try:
            write_text(self._path, json.dumps(found) + "\n")
        except OutputError as error:
            logger.warning("%s", error)
        return found


def _numbers(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.as_dict()
