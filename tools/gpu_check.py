#!/usr/bin/env python
"""Checks a GPU in minutes: whether results are right there, and how fast it is."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from reid.files import OutputError
from reid.workflows.gpu_check.docs import DocsError, write_docs
from reid.workflows.gpu_check.runner import PAGE, Settings, check, is_right
from reid.workflows.gpu_check.sections import chosen

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
EPILOG = """\
It needs torch, torchvision, timm and a few small packages (docs/gpu_check.md), no data set and no
network: images are made in memory. What a missing package takes with it is listed.

  python tools/gpu_check.py                                   six minutes, on the first GPU
  python tools/gpu_check.py --device cpu --minutes 1          every section, tiny, without a GPU
  python tools/gpu_check.py --only neighbours pseudo_labels   some sections
  python tools/gpu_check.py --docs logs/gpu_check/gpu_check.json   into docs/benchmarks.md

Exit code: 0 every check holds, 1 one does not or a section failed, 2 the command is wrong.
"""


def main() -> int:
    """Parses the arguments and checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    parser.add_argument("--minutes", type=float, default=6.0, help="in all (default: 6)")
    parser.add_argument(
        "--out", type=Path, default=Path("logs/gpu_check"), metavar="FOLDER",
        help="where gpu_check.json and gpu_check.html go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="some sections by name")
    parser.add_argument("--docs", type=Path, metavar="JSON", help="write docs/benchmarks.md of it")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {arguments.minutes:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: ends every process
    try:
        if arguments.docs is not None:
            write_docs(arguments.docs, BENCHMARKS)
            print(f"Written to {BENCHMARKS}")
            return 0
        sections = chosen(arguments.only)
        sizes = "full" if arguments.device == "cuda" else "toy"
        settings = Settings(arguments.device, arguments.minutes, arguments.out, sizes)
        results = check(sections, settings, lambda line: print(line, flush=True))
    except (DocsError, OutputError, ValueError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    for aim in results["aims"]:
        word = "reached" if aim["reached"] else "missed"
        print(f"{word}: {aim['what']}: {aim['seen']}, aimed at {aim['aim']}")
    for name, without in results["missing"].items():
        print(f"{name} is not installed, so that these were left out: {', '.join(without)}")
    print(f"{results['seconds']:.0f} s; read {arguments.out / PAGE}")
    return 0 if is_right(results) else 1


if __name__ == "__main__":
    sys.exit(main())
