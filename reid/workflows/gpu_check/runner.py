"""Runs the sections one after the other, each with a time limit, and writes results after each."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from reid.files import write_text
from reid.workflows.gpu_check.aims import aims
from reid.workflows.gpu_check.page import page
from reid.workflows.gpu_check.process import Background, DiedError, OutOfTimeError, Worker
from reid.workflows.gpu_check.sections import WHEELS, Section

JSON, PAGE, LOG = "gpu_check.json", "gpu_check.html", "gpu_check.log"
_START_S = 90.0
"""A process may take this long to start, since torch may be on a slow disk."""
_LEAST_S = 6.0
_OVERBOOKED = 2.0
"""A section may take this multiple of its share, since most sections need less than theirs."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        device: `cuda` or `cpu`.
        minutes: Total time.
        folder: Results are written here.
        sizes: `full` or `toy`.
    """

    device: str
    minutes: float
    folder: Path
    sizes: str


def check(
    sections: Sequence[Section], settings: Settings, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the sections and writes gpu_check.json, gpu_check.html and gpu_check.log.

    If a section runs out of time, fails or dies, the results say so and the next section runs in a
    new process. Later sections get the time that earlier ones did not use. Without a device, only
    the first section runs.

    Args:
        sections: The sections in order.
        settings: See `Settings`.
        tell: Receives a line for each section.

    Returns:
        The content of the JSON file.

    Raises:
        OutputError: A result cannot be written.
    """
    run = _Run(sections, settings)
    try:
        for number in range(len(sections)):
            found = run.section(number)
            run.write()
            tell(summary(found))
    except BaseException:
        run.interrupt()
        raise
    finally:
        run.end()
    return run.results


def missing(sections: Sequence[Section]) -> dict[str, list[str]]:
    """The sections that are left out, by missing module."""
    found: dict[str, list[str]] = {}
    for section in sections:
        for name in section.missing():
            found.setdefault(name, []).append(section.name)
    return found


def summary(found: Mapping[str, Any]) -> str:
    """A section in a line."""
    checks = found["checks"]
    right = sum(check["right"] for check in checks)
    counted = f", {right} of {len(checks)} checks hold" if checks else ""
    why = f": {found['why']}" if found["why"] else ""
    return f"{found['name']:<14} {found['seconds']:6.1f} s  {found['status']}{counted}{why}"


def is_right(results: Mapping[str, Any]) -> bool:
    """Whether every section finished and every check held."""
    bad = ("wrong", "failed", "out of time")
    return not any(found["status"] in bad for found in results["sections"])


class _Run:
    """The state of a run."""

    def __init__(self, sections: Sequence[Section], settings: Settings) -> None:
        self._sections, self._settings = sections, settings
        self._begun = time.monotonic()
        self._worker: Worker | None = None
        self._stopped = ""
        settings.folder.mkdir(parents=True, exist_ok=True)
        self._log = settings.folder / LOG
        write_text(self._log, "")
        self.results: dict[str, Any] = {
            "format": 1,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _commit(),
            "device": settings.device,
            "sizes": settings.sizes,
            "minutes": settings.minutes,
            "seconds": 0.0,
            "missing": missing(sections),
            "sections": [],
            "aims": [],
        }
        self._warming = self._warm_up()

    def _warm_up(self) -> Background | None:
        """Compiles the CPU's loops while the first sections use the device.

        On a fresh machine this takes half a minute, which would otherwise count for the first
        search. It does not run when the CPU is measured, since it would slow the CPU down.
        """
        if self._settings.device == "cpu" or "numba" in self.results["missing"]:
            return None
        return Background("warm_up", self._log, nice=True)

    def section(self, number: int) -> dict[str, Any]:
        """Runs a section if possible; returns its results."""
        section = self._sections[number]
        found = _blank(section)
        self.results["sections"].append(found)
        lacking = [WHEELS.get(name, name) for name in section.missing()]
        if lacking:
            found |= {"status": "left out", "why": f"needs {', '.join(lacking)}"}
        elif self._stopped:
            found |= {"status": "not run", "why": self._stopped}
        elif self._left() < 1:
            found |= {"status": "not run", "why": "no time was left"}
        else:
            alone = section.alone and self._settings.device == "cuda"
            if alone:
                self._end_worker()
            self._work(section, found, self._share(number))
            if alone or found["status"] in ("out of time", "failed"):
                self._end_worker()
        return found

    def _left(self) -> float:
        return self._begun + 60 * self._settings.minutes - time.monotonic()

    def _share(self, number: int) -> float:
        """The part of the remaining time that a section may take."""
        rest = self._sections[number:]
        able = [section.share for section in rest if not section.missing()]
        return self._sections[number].share / sum(able)

    def _work(self, section: Section, found: dict[str, Any], share: float) -> None:
        started = time.monotonic()
        try:
            if self._worker is None:
                self._worker = Worker(self._log, section.environment)
                self._worker.next_message(min(_START_S, self._left()))
            started = time.monotonic()
            limit = min(max(_OVERBOOKED * share * self._left(), _LEAST_S), self._left())
            found["limit"] = round(limit, 1)
            self._worker.ask(
                {
                    "run": section.run,
                    "seconds": limit,
                    "device": self._settings.device,
                    "sizes": self._settings.sizes,
                    "numbers": {one["name"]: one["numbers"] for one in self.results["sections"]},
                }
            )
            for message in _messages(self._worker, started + limit):
                self._take(message, found)
        except OutOfTimeError:
            why = f"ended after its {found['limit']:.0f} s" if found["limit"] else "never started"
            found |= {"status": "out of time", "why": why}
        except DiedError as error:
            found |= {"status": "failed", "why": "its process died", "error": str(error)}
        found["seconds"] = round(time.monotonic() - started, 1)
        if found["status"] == "running":
            found["status"] = _status(found)

    def _take(self, message: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Stores a message in the results."""
        kind = message["kind"]
        if kind == "check":
            found["checks"].append({key: message[key] for key in ("what", "right", "seen")})
        elif kind == "row":
            found["tables"].setdefault(message["table"], []).append(message["row"])
        elif kind == "number":
            found["numbers"][message["name"]] = message["value"]
        elif kind in ("note", "cut"):
            found[f"{kind}s"].append(message["text"])
        elif message["missing"]:
            found |= {"status": "left out", "why": message["missing"], "error": message["text"]}
        else:
            found |= {"status": "failed", "why": message["last"], "error": message["text"]}
            if message["fatal"]:
                self._stopped = message["last"]

    def write(self) -> None:
        """Writes the results so far.

        Raises:
            OutputError: A file cannot be written.
        """
        self.results["aims"] = aims(self.results)
        self.results["seconds"] = round(time.monotonic() - self._begun, 1)
        write(self.results, self._settings.folder)

    def interrupt(self) -> None:
        """Marks the running section as interrupted."""
        running = [one for one in self.results["sections"] if one["status"] == "running"]
        for found in running:
            found |= {"status": "interrupted", "why": "the whole run was stopped"}
        if running:
            self.write()

    def end(self) -> None:
        """Ends every process."""
        self._end_worker()
        if self._warming is not None:
            self._warming.end()

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the JSON file and the page.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / JSON, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_text(folder / PAGE, page(results))


def _blank(section: Section) -> dict[str, Any]:
    return {
        "name": section.name, "title": section.title, "group": section.group, "status": "running",
        "why": "", "seconds": 0.0, "limit": 0.0, "checks": [], "tables": {}, "numbers": {},
        "notes": [], "cuts": [], "error": "",
    }  # fmt: skip


def _messages(worker: Worker, end: float) -> Iterator[dict[str, Any]]:
    """Yields the messages of a section until it ends."""
    while True:
        message = worker.next_message(end - time.monotonic())
        if message["kind"] == "done":
            return
        yield message
        if message["kind"] == "error":
            return


def _status(found: Mapping[str, Any]) -> str:
    if not all(check["right"] for check in found["checks"]):
        return "wrong"
    return "cut short" if found["cuts"] else "done"


def _commit() -> str | None:
    """The commit of the code, if git and a repository are available."""
    git = shutil.which("git")
    if git is None:
        return None
    told = subprocess.run(
        [git, "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stdout.strip() or None
