#!/usr/bin/env python
"""Trains or evaluates the model that a config file describes."""

from __future__ import annotations

import argparse
import sys

from reid.config import load_config
from reid.engine.stopping import Interrupted, resume_command
from reid.workflows.errors import tells_errors
from reid.workflows.evaluate import evaluate
from reid.workflows.first_labels import first_labels
from reid.workflows.train import train

EPILOG = """\
Any setting can be given after the options as KEY VALUE pairs, which win over the file:

  python tools/train_net.py --config-file projects/TMGF/configs/msmt.yaml SOLVER.BASE_LR 7e-4
  python tools/train_net.py --config-file DATA --config-file METHOD  (METHOD wins over DATA)
  python tools/train_net.py --config-file FILE --resume
  python tools/train_net.py --config-file FILE --first-labels  (before training: how many clusters?)
  python tools/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS logs/run/model_best.safetensors
  torchrun --nproc-per-node 4 tools/train_net.py --config-file FILE

Ctrl-C and SIGTERM end the run after the current step, with a checkpoint and the command that resumes it
(exit code 130 or 143); a second one ends it at once.

reid/config.py documents every key. Datasets are in $REID_DATASETS (default: datasets/).
"""  # noqa: E501


@tells_errors()
def main() -> int:
    """Parses the arguments and runs; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        action="append",
        metavar="FILE",
        help="YAML file; if given several times, later files win",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    mode.add_argument(
        "--first-labels",
        action="store_true",
        help="only label the training images with the weights that training would start from, and "
        "tell how many clusters come out",
    )
    mode.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR"
    )
    mode.add_argument(
        "--overwrite", action="store_true", help="replace the run that OUTPUT_DIR holds"
    )
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume even if settings that change training differ",
    )
    parser.add_argument(
        "--expect-clusters",
        type=int,
        default=0,
        metavar="N",
        help="with --first-labels: fail if the number of clusters is not about N",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="settings that win over the file's"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.expect_clusters and not arguments.first_labels:
        parser.error("--expect-clusters goes with --first-labels")
    try:
        config = load_config(arguments.config_file, arguments.overrides)
        if arguments.eval_only:
            evaluate(config)
        elif arguments.first_labels:
            first_labels(config, arguments.expect_clusters)
        else:
            train(
                config,
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                allow_config_change=arguments.allow_config_change,
            )
    except Interrupted as stop:
        trains = not (arguments.eval_only or arguments.first_labels)
        command = f"\n{resume_command(sys.argv)}" if trains else ""
        sys.stderr.write(f"{stop}{command}\n")
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
