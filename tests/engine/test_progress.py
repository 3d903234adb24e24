from __future__ import annotations

import logging
import sys

import pytest

from reid.engine import logs, progress
from reid.engine.progress import ProgressLines


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(clock: Clock, seconds: list[float], total: int, title: str = "Extracting") -> None:
    """A job that finishes equal parts of `total` at the given times."""
    started, lines = clock.now, ProgressLines(title, "img", clock)
    for number, second in enumerate(seconds, 1):
        clock.now = started + second
        lines(total * number // len(seconds), total)
    lines.finish()


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reid")


def test_a_short_job_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    job(Clock(), [0.1, 5.0, 9.9], 300)
    assert caplog.messages == []


def test_a_long_job_logs_after_10_s_then_once_a_minute_and_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job(Clock(), [float(second) for second in range(1, 151)], 15_000)
    assert caplog.messages == [
        "Extracting: 1,000 of 15,000 img, 100 img/s, eta 0:02:20",
        "Extracting: 7,000 of 15,000 img, 100 img/s, eta 0:01:20",
        "Extracting: 13,000 of 15,000 img, 100 img/s, eta 0:00:20",
        "Extracting: 15,000 img in 0:02:30, 100 img/s",
    ]


def test_a_slow_job_logs_fractions(caplog: pytest.LogCaptureFixture) -> None:
    job(Clock(), [40.0, 80.0], 10, "Ranking")
    assert caplog.messages == [
        "Ranking: 5 of 10 img, 0.12 img/s, eta 0:00:40",
        "Ranking: 10 img in 0:01:20, 0.12 img/s",
    ]


def test_a_job_without_progress_logs_its_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    lines = ProgressLines("Clustering", "img", clock)
    clock.now += 30
    lines(0, 100)
    clock.now += 100
    lines.finish()
    assert caplog.messages == [
        "Clustering: 0 of 100 img, 0 img/s",
        "Clustering: done in 0:02:10",
    ]


class Stream:
    """A terminal or a file that stores the text."""

    encoding = "utf-8"

    def __init__(self, terminal: bool) -> None:
        self.text = ""
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("out_is_terminal", "error_is_terminal", "bar", "lines"),
    [(True, True, True, False), (False, False, False, True), (False, True, True, True)],
)
def test_a_bar_on_a_terminal_and_lines_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    out_is_terminal: bool,
    error_is_terminal: bool,
    bar: bool,
    lines: bool,
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    out, error = Stream(out_is_terminal), Stream(error_is_terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    with logs.progress_bar("Extracting", "img") as show:
        show(5, 10)
    assert ("Extracting" in error.text) == bar
    assert (
        any(message.startswith("Extracting: 5 of 10 img") for message in caplog.messages) == lines
    )


def test_a_job_that_fails_logs_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)

    def job() -> None:
        with logs.progress_bar("Extracting", "img") as show:
            show(5, 10)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        job()
    assert len(caplog.messages) == 1


def test_only_the_main_process_logs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr("reid.distributed.rank", lambda: 1)
    with logs.progress_bar("Extracting", "img") as show:
        show(5, 10)
    assert caplog.messages == []
