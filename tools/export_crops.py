#!/usr/bin/env python
"""Copies a data set's images into a folder for each camera, without identities."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.assembly.data import build_dataset, spec_of_words
from reid.data.export import export_crops
from reid.engine.logs import tool_logging
from reid.files import say
from reid.workflows.errors import tells_errors

EPILOG = """\
Use this to try training on your own cameras (docs/own_cameras.md) before you have crops:

  python tools/export_crops.py datasets/shop SyntheticPersons SEED 3

copies the training images to datasets/shop/camera1/000000.jpg and so on. The names do not show the
identities. With --labelled, query and gallery images are copied too, and datasets/shop/labels.csv
has their identities.
"""


@tells_errors()
@tool_logging()
def main() -> int:
    """Parses the arguments and copies; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "dataset", nargs="+", metavar="NAME KEY VALUE", help="name of a data set and its options"
    )
    parser.add_argument(
        "--labelled",
        action="store_true",
        help="copy test images too, with their labels in labels.csv",
    )
    arguments = parser.parse_intermixed_args()
    dataset = build_dataset(spec_of_words(arguments.dataset), "dataset")
    written = export_crops(dataset, arguments.folder, labelled=arguments.labelled)
    say(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
