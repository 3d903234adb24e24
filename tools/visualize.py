#!/usr/bin/env python
"""Draws pictures of a model: attention, parts, ranked lists, clusters, similarities."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.engine.metrics import show_picture
from reid.evaluation.feature_files import load_features
from reid.evaluation.ranking import pair_similarities
from reid.pictures.plots import draw_similarities
from reid.registry import ConfigError
from reid.workflows import pictures
from reid.workflows.errors import tells_errors
from reid.workflows.trained import load_trained, split_settings

EPILOG = """\
Give a model as the folder of a run, or as a config file and weights:

  python tools/visualize.py rollout --model logs/tmgf1 --model logs/tmgf   # side by side (figure 3)
  python tools/visualize.py rollout --model projects/TMGF/configs/market.yaml tmgf.safetensors
  python tools/visualize.py clusters --model logs/run --output clusters.png
  python tools/visualize.py embed --model logs/run --colour camera
  python tools/visualize.py histogram --features features.npz
  python tools/visualize.py ranked --model logs/run DATASETS.TEST Market1501   # any KEY VALUE

A picture of a run, or of weights in a run's folder, also appears in the run's TensorBoard, under
"pictures". tools/evaluate.py --help describes the .npz file.
"""


@tells_errors(ValueError, ModuleNotFoundError)
@tool_logging()
def main() -> int:
    """Parses the arguments and draws; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("rollout", "attention rollout of each model and each branch"),
        ("stripes", "the horizontal parts of each branch"),
        ("ranked", "queries with their best matches; junk is marked"),
        ("clusters", "contact sheet of the clusters in the training set"),
        ("embed", "t-SNE or UMAP of the features"),
        ("histogram", "similarities of right and wrong pairs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--model", action="append", nargs="+", default=[],
            metavar="PATH", help="folder of a run, or config file and weights",
        )  # fmt: skip
        command.add_argument(
            "--output", type=Path, default=Path(f"{name}.png"), metavar="PNG",
            help="(default: %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "settings",
            nargs="*",
            metavar="KEY VALUE",
            help="settings that win over the models' configs",
        )
        command.add_argument(
            "--set", nargs="+", default=[], metavar="KEY VALUE", help="the same, as an option"
        )
        command.add_argument(
            "--no-tensorboard", dest="tensorboard", action="store_false",
            help="do not show the picture in the TensorBoard of the models' runs",
        )  # fmt: skip
        if name in ("embed", "histogram"):
            command.add_argument(
                "--features", type=Path, metavar="NPZ", help="draw this, not a model"
            )
            command.add_argument("--csv", type=Path, metavar="LIST", help="list of NPZ's images")
        if name in ("rollout", "stripes", "ranked", "clusters"):
            command.add_argument("--count", type=int, default=8, help="rows (default: 8)")
        if name in ("rollout", "stripes"):
            command.add_argument(
                "--images", nargs="+", type=Path, default=(), metavar="FILE",
                help="images to show instead of queries of the first test set",
            )  # fmt: skip
        if name == "rollout":
            command.add_argument(
                "--heads", choices=("mean", "max", "min"), default="mean",
                help="how the heads of a layer are combined (default: mean)",
            )  # fmt: skip
        if name == "clusters":
            command.add_argument(
                "--columns", type=int, default=12, help="images per cluster (default: 12)"
            )
        if name == "embed":
            command.add_argument(
                "--method", choices=("tsne", "umap"), default="tsne", help="(default: tsne)"
            )
            command.add_argument(
                "--colour", choices=("identity", "camera", "cluster"), default="identity",
                help="identity or camera of test images, cluster of training images "
                "(default: identity)",
            )  # fmt: skip
    arguments = parser.parse_args()
    models = draw(arguments)
    print(f"Written to {arguments.output}")
    runs = dict.fromkeys(model.run for model in models if model.run is not None)
    for run in runs if arguments.tensorboard else ():
        show_picture(run, arguments.output)
        print(f"Shown in TensorBoard: tensorboard --logdir {run}")
    return 0


def draw(arguments: argparse.Namespace) -> list[pictures.TrainedModel]:
    """Draws the picture; returns the models that it shows."""
    output, features = arguments.output, getattr(arguments, "features", None)
    overrides, all_paths = [*arguments.set, *arguments.settings], []
    for words in arguments.model:
        paths, behind = split_settings(words)
        all_paths.append(paths)
        overrides = [*behind, *overrides]
        if len(paths) > 2:
            raise ConfigError(
                f"--model: expected a run's folder, or a config file and weights, got {len(paths)} "
                "paths; give --model once for each model"
            )
    models = [load_trained(*paths, overrides=overrides) for paths in all_paths]
    if features is None and not models:
        raise ConfigError("expected --model, got none")
    if len(models) > 1 and arguments.command != "rollout":
        raise ConfigError(f"{arguments.command}: expected one --model, got {len(models)}")
    match arguments.command:
        case "rollout" | "stripes":
            records, dataset = pictures.pick_images(models[0], arguments.count, arguments.images)
            if arguments.command == "rollout":
                pictures.picture_attention(output, models, records, dataset, arguments.heads)
            else:
                pictures.picture_stripes(output, models[0], records)
        case "ranked":
            pictures.picture_ranked_lists(output, models[0], arguments.count)
        case "clusters":
            pictures.picture_clusters(output, models[0], arguments.count, arguments.columns)
        case "embed" if arguments.colour == "cluster":
            if not models:
                raise ConfigError("--colour cluster needs --model, since its clusterer is used")
            pictures.picture_cluster_embedding(output, models[0], arguments.method)
        case _:
            if features is not None:
                either = arguments.command == "embed"  # a picture of points needs no pairs
                pair = load_features(features, arguments.csv, any_split=either)[:2]
                name = features.stem
                models = []  # the picture shows none of them
            else:
                pair, name = models[0].test_features(), models[0].name
            if arguments.command == "histogram":
                draw_similarities(output, pair_similarities(*pair))
            else:
                pictures.picture_embedding(output, *pair, arguments.colour, arguments.method, name)
    return models


if __name__ == "__main__":
    sys.exit(main())
