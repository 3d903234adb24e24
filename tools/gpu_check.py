#!/usr/bin/env python
"""Checks in minutes whether results on a GPU are right, and how fast the GPU is."""

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
It needs torch, torchvision, timm and a few small packages (docs/gpu_check.md), but no data set and
no network: it makes images in memory. It lists the sections that a missing package prevents.

  python tools/gpu_check.py                                   six minutes, on the first GPU
  python tools/gpu_check.py --device cpu --minutes 1          every section, tiny, without a GPU
  python tools/gpu_check.py --only neighbours pseudo_labels   some sections
  python tools/gpu_check.py --docs logs/gpu_check/gpu_check.json   write docs/benchmarks.md

Exit code: 0 every check holds, 1 a check or a section fails, 2 the command is wrong.
"""


def main() -> int:
    """Parses the arguments and checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    parser.add_argument("--minutes", type=float, default=6.0, help="total time (default: 6)")
    parser.add_argument(
        "--out", type=Path, default=Path("logs/gpu_check"), metavar="FOLDER",
        help="where gpu_check.json and gpu_check.html go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="some sections by name")
    parser.add_argument("--docs", type=Path, metavar="JSON", help="write it to docs/benchmarks.md")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {arguments.minutes:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like Ctrl-C, ends every process
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
        print(f"{name} is not installed, so these sections were left out: {', '.join(without)}")
    print(f"{results['seconds']:.0f} s; read {arguments.out / PAGE}")
    return 0 if is_right(results) else 1


if __name__ == "__main__":
    sys.exit(main())
