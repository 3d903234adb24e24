"""The tests of the suite that are marked `gpu`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from reid.workflows.gpu_check.findings import Context

ROOT = Path(__file__).parents[4]
TESTS = ROOT / "tests" / "gpu"
_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def run(context: Context) -> None:
    """Runs them in a process of their own; what they print goes to gpu_check.log."""
    found = context.found
    if not TESTS.is_dir():
        found.cut(f"the tests: {TESTS} does not exist, since the package alone is installed")
        return
    command = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider",
        "--rootdir", str(ROOT), "-o", "addopts=--import-mode=importlib",
        "-o", "filterwarnings=default",
        # the suite's fixtures need packages that a bare machine lacks; these tests need none
        "--noconftest", str(TESTS),
    ]  # fmt: skip
    skipped, ran = 0, 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            result = _RESULT.match(line)
            if result is None:
                continue
            name, word = result[1].rpartition("/")[2], result[2]
            if word in ("SKIPPED", "XFAIL"):
                skipped += 1
                continue
            ran += 1
            seen = "" if word == "PASSED" else "the log tells more"
            found.check(f"{name} passes", word == "PASSED", seen)
        sys.stdout.flush()
    found.number("tests", ran)
    found.number("skipped", skipped)
    # 5: no test was selected, which is as wrong here as one that fails.
    found.check(
        "pytest ran to its end", process.returncode in (0, 1), f"exit code {process.returncode}"
    )
    if skipped:
        found.cut(f"{skipped} tests, which were skipped: they need a GPU")
