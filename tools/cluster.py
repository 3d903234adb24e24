#!/usr/bin/env python
"""Clusters millions of features on disk, in blocks that several processes share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.engine.stopping import Interrupted, TimeIsUp
from reid.files import say
from reid.neighbors.shards import ShardSettings
from reid.workflows.cluster import cluster_file
from reid.workflows.errors import tells_errors

EPILOG = """\
  python tools/cluster.py crops.npz --work-dir work --output labels.csv
  torchrun --nproc-per-node 2 tools/cluster.py features.npy --work-dir work --output labels.npy

FEATURES are unit vectors: an .npy file of (N, D) numbers, or a file of tools/extract.py. Labels are
in the order of the rows, -1 = outlier; where the file knows cameras, a .csv also has proxies:
clusters split by camera. They are those of JaccardDBSCAN, to the bit, if the search is exact. After
Ctrl-C or a kill the same command goes on where it stopped. docs/scale.md says what it takes.
"""


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", type=Path, metavar="FEATURES", help="the file")
    parser.add_argument(
        "--work-dir", required=True, type=Path, metavar="FOLDER",
        help="for what is between, on a fast local disk; emptied at the end",
    )  # fmt: skip
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".csv or .npy of the labels"
    )
    parser.add_argument("--k1", type=int, default=30, help="neighbours (default: %(default)s)")
    parser.add_argument("--k2", type=int, default=6, help="rows averaged (default: %(default)s)")
    parser.add_argument(
        "--eps", type=float, default=0.5, help="largest distance (default: %(default)s)"
    )
    parser.add_argument(
        "--min-samples", type=int, default=4,
        help="neighbours that make a core point (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=("exact", "ivf"), default="exact",
        help="ivf: an inverted file, for millions of rows; it takes a fraction of the time, and "
        "misses some neighbours in a thousand; the log says how many (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--memory-gb", type=float, default=1.0, metavar="GB",
        help="for the candidates of a process, beside half a GB for the program and the files that "
        "the system keeps in memory while it has room (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after-blocks", type=int, metavar="N", help="do N blocks, and go on another time"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    return parser.parse_args()


@tells_errors(ValueError)
@tool_logging()
def main() -> int:
    """Clusters what the arguments say; returns the exit code."""
    arguments = parse()
    settings = ShardSettings(
        arguments.k1, arguments.k2, arguments.eps, arguments.min_samples,
        memory=1e9 * arguments.memory_gb, search=arguments.search,
    )  # fmt: skip
    try:
        found = cluster_file(
            arguments.features, arguments.work_dir, arguments.output, settings,
            stop_after=arguments.stop_after_blocks, overwrite=arguments.overwrite,
        )  # fmt: skip
    except (Interrupted, TimeIsUp) as stop:
        sys.stderr.write(f"{stop}; the same command goes on where it stopped\n")
        return stop.exit_code
    if found is not None:
        say(str(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
