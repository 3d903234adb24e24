#!/usr/bin/env python
"""Evaluates features that any code has made, under the protocol of Market-1501."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from reid.engine.logs import progress_bar, tool_logging
from reid.evaluation.report import evaluate_file, report_text
from reid.files import say, write_text
from reid.workflows.errors import tells_errors

EPILOG = """\
FEATURES is an .npz file of the arrays `query_feat` (Q, D), `gallery_feat` (G, D), `query_pids`,
`gallery_pids`, `query_camids`, `gallery_camids`; or of `features` (N, D) together with --csv, a
list of N images with the header path,pid,camid,split in the same order; or a file that
tools/extract.py wrote of a data set with query and gallery. Features are made unit vectors first.

  python tools/evaluate.py features.npz
  python tools/evaluate.py features.npz --csv list.csv --output results.json RERANKING true K1 20
"""


@tells_errors(ValueError)
@tool_logging()
def main() -> int:
    """Parses the arguments and evaluates; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", type=Path, metavar="FEATURES", help=".npz or .safetensors file")
    parser.add_argument("--csv", type=Path, metavar="LIST", help="identities, cameras and splits")
    parser.add_argument("--evaluator", default="Market1501Evaluator", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write all numbers to a file")
    parser.add_argument(
        "options",
        nargs="*",
        metavar="KEY VALUE",
        help="options of the evaluator, e.g. AP trapezoid",
    )
    arguments = parser.parse_intermixed_args()
    with progress_bar("Evaluating", "query") as progress:
        report = evaluate_file(
            arguments.features, arguments.csv, arguments.evaluator, arguments.options, progress
        )
    say(report_text(report))
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(report, indent=2) + "\n")
        say(f"Written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
