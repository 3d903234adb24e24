#!/usr/bin/env python
"""Writes an HTML page about a run, or about several side by side; it needs no network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.workflows.errors import tells_errors
from reid.workflows.report import write_report

EPILOG = """\
  python tools/report.py logs/run                        # writes logs/run/report.html
  python tools/report.py logs/run logs/other             # writes report.html here, side by side
"""


@tells_errors()
@tool_logging()
def main() -> int:
    """Parses the arguments and writes; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="HTML",
        help="(default: report.html in the run's folder; for several runs, here)",
    )  # fmt: skip
    arguments = parser.parse_args()
    print(f"Written to {write_report(arguments.runs, arguments.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
