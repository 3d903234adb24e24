#!/usr/bin/env python
"""Trains the rows of a paper's table and prints our numbers beside the paper's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.stopping import Interrupted
from reid.workflows.comparison import load_paper
from reid.workflows.errors import USER_ERRORS, tell, tells_errors
from reid.workflows.reproduce import reproduce

EPILOG = """\
Every row is a run in OUTPUT/DATASET/ROW/seedS, shared by all tables. If you repeat the command, it
skips finished runs and resumes interrupted ones. If a row or data set fails, the tool reports it,
trains the others, and ends with an exit code other than 0. KEY VALUE pairs go to every row:

  python tools/reproduce.py --table 2 --dataset msmt --seeds 3
  python tools/reproduce.py --table 2 --dataset synthetic               (minutes per row on a CPU)
  python tools/reproduce.py --table 5                                     (all its data sets)
  python tools/reproduce.py --table 3 --dataset msmt --rows parts_2_4,parts_3_4 DEVICE cuda:1
  python tools/reproduce.py --table 3 --dataset msmt --report-only
"""


@tells_errors()
def main() -> int:
    """Parses the arguments and reproduces; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=int, required=True, metavar="N", help="number in the paper")
    parser.add_argument(
        "--dataset", metavar="NAME", help="key in the tables' file (default: each of the table's)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", default="", metavar="A,B", help="keys in the tables' file (default: all)"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("logs/reproduce"),
        metavar="OUTPUT",
        help="(default: %(default)s)",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--tables",
        type=Path,
        default=Path("projects/TMGF/tables.yaml"),
        metavar="FILE",
        help="file of the paper's tables (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="settings that win over the files'"
    )
    arguments = parser.parse_intermixed_args()
    paper = load_paper(arguments.tables)
    table = paper.table(arguments.table)
    codes = []
    for dataset in [arguments.dataset] if arguments.dataset else table.datasets:
        try:
            whole = reproduce(
                paper,
                arguments.table,
                dataset,
                arguments.output_dir,
                seeds=arguments.seeds,
                rows=[row for row in arguments.rows.split(",") if row],
                overrides=arguments.overrides,
                report_only=arguments.report_only,
                say=lambda text: print(text, flush=True),
            )
        except Interrupted as stop:
            sys.stderr.write(f"{stop}; the same command resumes it\n")
            return stop.exit_code
        except USER_ERRORS as error:  # the other data sets can still be trained
            codes.append(tell(error))
        else:
            codes.append(0 if whole else 1)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
