#!/usr/bin/env python
"""Opens a page in the browser to judge a run's clusters and label its images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.workflows.errors import tells_errors
from reid.workflows.review import review

EPILOG = """\
  python tools/review.py logs/run                                    # prints a link
  python tools/review.py logs/run --labels datasets/own/labels.csv   # the list beside images
  python tools/review.py logs/run --write                            # the list, without a page
"""


@tells_errors()
@tool_logging()
def main() -> int:
    """Parses the arguments and serves; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--folder", type=Path,
        help="where answers, features and thumbnails are stored (default: RUN/review)",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, metavar="CSV",
        help="the list to write (default: labels.csv in --folder)",
    )  # fmt: skip
    parser.add_argument(
        "--test-share", type=float, default=0.5, metavar="SHARE",
        help="of the labelled persons, for query and gallery; the others are for training "
        "(default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--address", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="0: any (default: 8765)")
    parser.add_argument(
        "--write", action="store_true", help="write the list and end, without a page"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="settings that win over the run's"
    )
    arguments = parser.parse_args()
    review(
        arguments.run,
        folder=arguments.folder,
        labels=arguments.labels,
        test_share=arguments.test_share,
        address=arguments.address,
        port=arguments.port,
        write_only=arguments.write,
        overrides=arguments.overrides,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
