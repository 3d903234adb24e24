"""Runs the tests that are marked `gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reid.workflows.gpu_check.findings import Context

ROOT = Path(__file__).parents[4]
TESTS = ROOT / "tests" / "gpu"
_OPTIONS = (
    "-q", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default",
    "-o", "addopts=--import-mode=importlib",
    # conftest.py needs packages that a bare machine lacks, and these tests do not need it.
    "--noconftest",
)  # fmt: skip


class _Recorder:
    """Reports the outcome of each test when it ends."""

    def __init__(self, context: Context) -> None:
        self._found = context.found
        self.ran, self.skipped = 0, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest at the end of a test's set-up, body and tear-down."""
        if report.skipped:
            self.skipped += 1
        elif report.failed or report.when == "call":
            self.ran += 1
            name = report.nodeid.rpartition("/")[2]
            lines = str(report.longrepr).strip().splitlines() if report.failed else [""]
            self._found.check(f"{name} passes", not report.failed, lines[-1])

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest for each file of tests that it has read."""
        if report.failed:
            last = str(report.longrepr).strip().splitlines()[-1]
            self._found.check(f"{report.nodeid} can be read", False, last)


def run(context: Context) -> None:
    """Runs the tests in this process; pytest's output goes to gpu_check.log."""
    import pytest

    if not TESTS.is_dir():
        context.found.cut(
            f"the tests: {TESTS} does not exist, since the package alone is installed"
        )
        return
    recorder = _Recorder(context)
    code = pytest.main([*_OPTIONS, "--rootdir", str(ROOT), str(TESTS)], plugins=[recorder])
    context.found.number("tests", recorder.ran)
    context.found.number("skipped", recorder.skipped)
    context.found.check(
        "pytest runs to its end", code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
        f"exit code {int(code)}, {recorder.ran} tests",
    )  # fmt: skip
    if recorder.skipped:
        context.found.cut(f"{recorder.skipped} tests, which were skipped: they need a GPU")
