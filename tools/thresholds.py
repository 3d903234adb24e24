#!/usr/bin/env python
"""Measures from which similarity two pictures count as the same person, for a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.files import say
from reid.registry import ConfigError
from reid.workflows.errors import tells_errors
from reid.workflows.measure_thresholds import (
    thresholds_of_dataset,
    thresholds_of_features,
    thresholds_of_model,
    thresholds_of_run,
)
from reid.workflows.predict import Predictor
from reid.workflows.thresholds import save_thresholds

EPILOG = """\
  python tools/thresholds.py --model logs/run                       # from its config's test set
  python tools/thresholds.py --model logs/run --dataset CSV PATH shop/labels.csv
  python tools/thresholds.py --model logs/run --features shop.npz   # what tools/extract.py wrote
  python tools/thresholds.py --model logs/run --show                # what is stored
  python tools/thresholds.py --model model.onnx --copy logs/run     # measured after the export

If nothing is labelled, the model's clusters replace the identities, and the table says so. The
tool stores the table beside the weights, as model_best.thresholds.json, where Predictor and
tools/search.py find it. docs/use.md explains how to choose.
"""


@tells_errors()
@tool_logging()
def main() -> int:
    """Parses the arguments and measures; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, type=Path, help="folder of a run, config, .safetensors or .onnx"
    )
    parser.add_argument("--weights", type=Path, help="in place of the run's or the config's")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--features", type=Path, metavar="FILE", help="of this model")
    images.add_argument(
        "--dataset", nargs="+", metavar="NAME KEY VALUE", help="name of a data set and its options"
    )
    images.add_argument(
        "--copy", type=Path, metavar="MODEL", help="those stored for the same model in another file"
    )
    images.add_argument("--show", action="store_true", help="the stored table; nothing is measured")
    parser.add_argument(
        "--clusters", action="store_true", help="use clusters even if there are labels"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: from the config)")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that read images (default: 4)"
    )
    arguments = parser.parse_args()
    predictor = Predictor(arguments.model, arguments.weights, device=arguments.device)
    clusters, workers = arguments.clusters, arguments.workers
    if arguments.show:
        if predictor.thresholds is None:
            raise ConfigError(f"{predictor.weights}: has no thresholds yet; call without --show")
        say(str(predictor.thresholds))
        return 0
    if arguments.copy is not None:
        found = thresholds_of_model(predictor, arguments.copy)
    elif arguments.features is not None:
        found = thresholds_of_features(predictor, arguments.features, clusters=clusters)
    elif arguments.dataset:
        found = thresholds_of_dataset(
            predictor, arguments.dataset, clusters=clusters, num_workers=workers
        )
    else:
        found = thresholds_of_run(predictor, clusters=clusters, num_workers=workers)
    say(f"{found}\n")
    path = save_thresholds(predictor.weights, predictor.fingerprint, found)
    say(f"Written to {path}; the default threshold is {found.recommended:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
