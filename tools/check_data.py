#!/usr/bin/env python
"""Checks a data set: published counts, broken and duplicate images, labels that must be wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from reid.assembly.data import build_datasets, spec_of_words
from reid.config import load_config
from reid.data.check_report import check_dataset, fix_list, load_splits, report_text
from reid.engine.logs import tool_logging
from reid.files import say, write_text
from reid.registry import ConfigError
from reid.structures import DataError
from reid.workflows.errors import tell, tells_errors

EPILOG = """\
Give the name of a data set with its options, or a config file, to check all of its data sets:

  python tools/check_data.py Market1501
  python tools/check_data.py Folder PATH shop --fix-list shop_leave_out.txt
  python tools/check_data.py --config-file configs/own_cameras.yaml DATASETS.TRAIN.PATH shop

Use the list of --fix-list as LEAVE_OUT of the data set: DATASETS.TRAIN.LEAVE_OUT FILE.
Exit code: 0 nothing is wrong, 1 something is wrong, 2 the command is wrong.
"""


@tells_errors()
@tool_logging()
def main() -> int:
    """Parses the arguments and checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="NAME KEY VALUE",
        help="name of a data set and its options; with --config-file, settings that win over it",
    )
    parser.add_argument("--config-file", action="append", metavar="FILE", help="YAML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file")
    parser.add_argument("--fix-list", type=Path, metavar="FILE", help="list to leave out")
    parser.add_argument("--no-images", action="store_true", help="do not read the images")
    parser.add_argument(
        "--min-side",
        type=int,
        default=16,
        metavar="PIXELS",
        help="tiny if smaller (default: 16)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads (default: CPUs)"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.workers < 1 or arguments.min_side < 1:
        parser.error("expected --workers and --min-side of 1 or more")
    try:
        datasets = build_datasets(*_specs(arguments.config_file, arguments.settings))
        if arguments.fix_list is not None and len(datasets) > 1:
            raise ConfigError("--fix-list: expected one data set, since each has its own list")
        reports = []
        for dataset in datasets:
            splits = load_splits(dataset)
            total = len({record.path for records in splits.values() for record in records})
            # The bar goes to standard output, since decoders write complaints to standard error.
            with tqdm(total=total, unit=" images", disable=None, file=sys.stdout) as bar:
                report = check_dataset(
                    dataset,
                    splits,
                    images=not arguments.no_images,
                    min_side=arguments.min_side,
                    workers=arguments.workers,
                    progress=bar.update,
                )
            say(f"\n{report_text(report)}")
            reports.append(report)
        if arguments.fix_list is not None:
            text = fix_list(reports[0])
            write_text(arguments.fix_list, text)
            listed = sum(not line.startswith("#") for line in text.splitlines())
            say(f"{listed:,} images to leave out: {arguments.fix_list}")
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(reports, indent=2) + "\n")
            say(f"Written to {arguments.json}")
    except ConfigError:
        raise
    except (DataError, ValueError) as error:
        return tell(error, code=1)
    return 0 if all(report["ok"] for report in reports) else 1


def _specs(config_files: list[str] | None, settings: list[str]) -> tuple[object, str]:
    """The specs of the data sets to check, and their key for messages."""
    if config_files is not None:
        datasets = load_config(config_files, settings).datasets
        train = datasets.train if isinstance(datasets.train, list) else [datasets.train]
        return [spec for spec in [*train, *datasets.test] if spec], "datasets"
    return spec_of_words(settings), "dataset"


if __name__ == "__main__":
    sys.exit(main())
