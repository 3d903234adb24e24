#!/usr/bin/env python
"""Converts a published checkpoint, or one of a run, to safetensors that this framework loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.assembly.plugins import import_plugins
from reid.files import say
from reid.modeling.convert import convert_weights
from reid.modeling.formats import FORMATS
from reid.workflows.errors import tells_errors

EPILOG = """\
The names of the tensors show the format. The report says what became of every tensor; an incomplete
mapping is an error unless you give --partial. No code in a file is ever run.

  python tools/convert_weights.py vit_small_ics_cfs_lup.pth weights/luperson.safetensors
  python tools/convert_weights.py tmgf_market.pth weights/tmgf.safetensors --plugins tmgf
  python tools/convert_weights.py logs/run/model_final.safetensors start.safetensors --part backbone

Formats: """


@tells_errors()
def main() -> int:
    """Parses the arguments and converts; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG + ", ".join(known.name for known in FORMATS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="checkpoint: .pth, .pt, .tar or .safetensors")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--format", metavar="NAME", help="format of the source")
    parser.add_argument(
        "--part",
        choices=("model", "backbone"),
        default="model",
        help="backbone: without head and camera embeddings, as the start of a training",
    )
    parser.add_argument("--half", action="store_true", help="write in half precision")
    parser.add_argument("--partial", action="store_true", help="write an incomplete mapping too")
    parser.add_argument(
        "--drop", nargs="+", default=(), metavar="PATTERN", help="tensors to leave out"
    )
    parser.add_argument("--plugins", nargs="+", default=(), metavar="PACKAGE", help="import first")
    parser.add_argument("--url", default="", help="where the source came from")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="image size, pixels")
    parser.add_argument("--mean", nargs=3, type=float, help="pixel mean in training, with --std")
    parser.add_argument("--std", nargs=3, type=float, help="pixel standard deviation in training")
    arguments = parser.parse_args()
    if (arguments.mean is None) != (arguments.std is None):
        parser.error("--mean and --std belong together")
    import_plugins(arguments.plugins)
    report = convert_weights(
        arguments.source,
        arguments.output,
        written_as=arguments.format,
        part=arguments.part,
        half=arguments.half,
        partial=arguments.partial,
        drop=arguments.drop,
        url=arguments.url,
        statistics=None
        if arguments.mean is None
        else (tuple(arguments.mean), tuple(arguments.std)),
        image_size=None if arguments.size is None else tuple(arguments.size),
    )
    say(f"{report}\nWritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
