#!/usr/bin/env python
"""Trains the rows of a paper's table and prints our numbers beside the paper's."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from reid.engine.stopping import Interrupted, TimeIsUp, deadline_after, same_command
from reid.workflows.comparison import load_paper
from reid.workflows.errors import USER_ERRORS, tell, tells_errors
from reid.workflows.reproduce import reproduce

EPILOG = """\
Every row is a run in OUTPUT/DATASET/ROW/seedS, shared by all tables. If you repeat the command, it
skips finished runs and resumes interrupted ones. All rows get their first seed before any gets its
second. With --hours, no run begins after that time, and the running one ends with its next whole
epoch; the tool then says which runs are left, and the same command goes on with them. The results
are those of an uninterrupted run, bit for bit. KEY VALUE pairs go to every row:

  python tools/reproduce.py --table 2 --dataset msmt --seeds 3
  python tools/reproduce.py --table 2 --dataset synthetic               (minutes per row on a CPU)
  python tools/reproduce.py --table 5                                     (all its data sets)
  python tools/reproduce.py --table 5 --dataset synthetic --seeds 3 --hours 8       (one night)
  python tools/reproduce.py --table 3 --dataset msmt --rows parts_2_4,parts_3_4 DEVICE cuda:1
  python tools/reproduce.py --table 3 --dataset msmt --report-only

Exit codes: 0 all is done; 1 a row failed, the others are trained; 2 an argument, a config or a data
set is wrong; 3 the time of --hours is over and runs are left; 130 Ctrl-C; 143 SIGTERM.
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
    parser.add_argument(
        "--hours", type=float, metavar="N", help="stop after this time (default: when all is done)"
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
    deadline = math.inf if arguments.hours is None else deadline_after(arguments.hours)
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
                deadline=deadline,
                say=lambda text: print(text, flush=True),
            )
        except Interrupted as stop:
            sys.stderr.write(f"{stop}; the same command resumes it\n")
            return stop.exit_code
        except TimeIsUp as stop:
            sys.stderr.write(f"{stop}\n")
            codes.append(stop.exit_code)
        except USER_ERRORS as error:  # the other data sets can still be trained
            codes.append(tell(error))
        else:
            codes.append(0 if whole else 1)
    if TimeIsUp.exit_code in codes:
        sys.stderr.write(f"The time is over; this goes on:\n{same_command(sys.argv)}\n")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
