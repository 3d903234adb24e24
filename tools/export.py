#!/usr/bin/env python
"""Writes a trained model as ONNX if onnxruntime gives the same features as torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.files import say
from reid.workflows.errors import tells_errors
from reid.workflows.export import ExportError, export_model

EPILOG = """\
MODEL is the folder of a run (its best or else final weights are used), or a config file with
--weights. The file takes images (N, 3, H, W), float32, normalised, and gives unit vectors (N, D)
for any N; docs/export.md has ten lines that run it. If the file differs too much from the torch
model, it is not written, and the exit code is 2.

  python tools/export.py logs/demo model.onnx --measure
  python tools/export.py logs/demo tracker.onnx --cameras mean --precision fp16
  python tools/export.py logs/demo small.onnx --precision int8 --calibration crops/
"""


@tells_errors(ExportError)
@tool_logging()
def main() -> int:
    """Parses the arguments and exports; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a run, or a config")
    parser.add_argument("output", type=Path, metavar="ONNX", help="file to write")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="in place of the run's")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="(default: fp32)"
    )
    parser.add_argument(
        "--cameras", choices=("input", "mean"), default="input",
        help="of a model with camera embeddings: a second input, or for each image the mean of all "
        "cameras (default: input)",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", type=Path, default=(), metavar="PATH",
        help="files or folders to compare on (default: queries of the first test set)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", nargs="+", type=Path, default=(), metavar="PATH",
        help="int8: files or folders of images to measure the ranges of activations on",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="mAP on the first test set, before and after"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar=("KEY", "VALUE"),
        help="settings that win over the config",
    )
    arguments = parser.parse_args()
    exported = export_model(
        arguments.model,
        arguments.output,
        arguments.weights,
        precision=arguments.precision,
        cameras=arguments.cameras,
        images=arguments.images,
        calibration=arguments.calibration,
        measure=arguments.measure,
        overrides=arguments.set,
    )
    say(exported.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
