#!/usr/bin/env python
"""Writes the backbone of a trained model as a checkpoint that others can start from.

Camera embeddings are left out, since they belong to the cameras of the training set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.modeling.weights import WeightsError, export_backbone


def main() -> int:
    """Parses the arguments and exports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="model_final.safetensors of a run")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    try:
        report = export_backbone(arguments.model, arguments.output)
    except WeightsError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
