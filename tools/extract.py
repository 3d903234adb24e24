#!/usr/bin/env python
"""Writes features of images to a file: of folders, lists, pictures, or a data set by name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.engine.stopping import Interrupted
from reid.files import say
from reid.registry import ConfigError
from reid.workflows.errors import tells_errors
from reid.workflows.extract import extract
from reid.workflows.extraction_lists import SPLITS, list_dataset, list_paths
from reid.workflows.predict import Predictor

EPILOG = """\
  python tools/extract.py crops/ --model logs/run --output crops.npz
  python tools/extract.py shop/list.csv --model logs/run --output shop.npz   # path,pid,camid,split
  python tools/extract.py a.jpg b.jpg --model model.onnx --output two.safetensors
  python tools/extract.py --model logs/run --output test.npz --dataset CSV PATH shop/list.csv

tools/evaluate.py and tools/visualize.py read what it writes. After Ctrl-C the same command goes on
where it stopped, and its result is the same to the bit. docs/use.md describes the file.
"""


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH",
        help="folder (all images below), list (.csv with a header, or .txt, one path per line), "
        "or picture",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, type=Path, help="folder of a run, config, .safetensors or .onnx"
    )
    parser.add_argument("--weights", type=Path, help="in place of the run's or the config's")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".npz or .safetensors"
    )
    parser.add_argument(
        "--dataset", nargs="+", default=(), metavar="NAME KEY VALUE",
        help="name of a data set and its options, in place of paths",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="+", default=(), choices=SPLITS,
        help="of the data set (default: query and gallery, or else train)",
    )  # fmt: skip
    parser.add_argument(
        "--camera-folders", action="store_true",
        help="the first folder below each PATH is the camera's name",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="images at once (default: from the config)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: from the config)")
    parser.add_argument("--precision", help="fp32, bf16 or fp16 (default: from the config)")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that read images (default: 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and start anew")
    return parser.parse_args()


@tells_errors()
@tool_logging()
def main() -> int:
    """Extracts what the arguments say; returns the exit code."""
    arguments = parse()
    if bool(arguments.paths) == bool(arguments.dataset):
        raise ConfigError("expected either paths or --dataset to say which images")
    predictor = Predictor(
        arguments.model,
        arguments.weights,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
    )
    if arguments.dataset:
        images = list_dataset(arguments.dataset, predictor.card, arguments.splits)
    else:
        images = list_paths(
            arguments.paths, predictor.card, camera_folders=arguments.camera_folders
        )
    try:
        written = extract(
            predictor,
            images,
            arguments.output,
            num_workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    except Interrupted as stop:
        sys.stderr.write(f"{stop}; the same command goes on where it stopped\n")
        return stop.exit_code
    say(str(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
