#!/usr/bin/env python
"""Draws what a model sees and finds: attention, parts, ranked lists, clusters, similarities."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import show_picture, tool_logging
from reid.evaluation.feature_files import load_features
from reid.evaluation.ranking import pair_similarities
from reid.pictures.plots import draw_similarities
from reid.registry import ConfigError
from reid.workflows import pictures
from reid.workflows.errors import tells_errors

EPILOG = """\
A model is the folder of a run, or a config file and weights:

  python tools/visualize.py rollout --model logs/tmgf1 --model logs/tmgf   # side by side (figure 3)
  python tools/visualize.py rollout --model projects/TMGF/configs/market.yaml tmgf.safetensors
  python tools/visualize.py clusters --model logs/run --output clusters.png
  python tools/visualize.py embed --model logs/run --colour camera
  python tools/visualize.py histogram --features features.npz

The picture of a run, or of weights in its folder, is shown in the run's TensorBoard too, below
"pictures". tools/evaluate.py --help tells what an .npz file has.
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
        ("rollout", "attention rollout, of each model and each branch"),
        ("stripes", "the horizontal parts of each branch"),
        ("ranked", "queries with their best matches; junk is marked"),
        ("clusters", "contact sheet of the clusters in the training set"),
        ("embed", "t-SNE or UMAP of the features"),
        ("histogram", "similarities of right and wrong pairs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--model", action="append", nargs="+", default=[], type=Path,
            metavar="PATH", help="folder of a run, or config file and weights",
        )  # fmt: skip
        command.add_argument(
            "--output", type=Path, default=Path(f"{name}.png"), metavar="PNG",
            help="(default: %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--set", nargs="+", default=[], metavar="KEY VALUE", help="win over the models' configs"
        )
        command.add_argument(
            "--no-tensorboard", dest="tensorboard", action="store_false",
            help="leave the TensorBoard of the models' runs as it is",
        )  # fmt: skip
        if name in ("embed", "histogram"):
            command.add_argument("--features", type=Path, metavar="NPZ", help="in place of a model")
            command.add_argument("--csv", type=Path, metavar="LIST", help="of the images in NPZ")
        if name in ("rollout", "stripes", "ranked", "clusters"):
            command.add_argument("--count", type=int, default=8, help="rows (default: 8)")
        if name in ("rollout", "stripes"):
            command.add_argument(
                "--images", nargs="+", type=Path, default=(), metavar="FILE",
                help="in place of queries of the first test set",
            )  # fmt: skip
        if name == "rollout":
            command.add_argument(
                "--heads", choices=("mean", "max", "min"), default="mean",
                help="how those of a layer are joined (default: mean)",
            )  # fmt: skip
        if name == "clusters":
            command.add_argument(
                "--columns", type=int, default=12, help="images of a cluster (default: 12)"
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
    """Draws the picture that was asked for; returns the models that it is of."""
    output, features = arguments.output, getattr(arguments, "features", None)
    for paths in arguments.model:
        if len(paths) > 2:
            raise ConfigError(
                f"--model: expected a run's folder, or a config file and weights, got {len(paths)} "
                "paths; give --model once for each model"
            )
    models = [pictures.load_trained(*paths, overrides=arguments.set) for paths in arguments.model]
    if features is None and not models:
        raise ConfigError("expected a --model to draw, got none")
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
                raise ConfigError("--colour cluster needs a --model, whose clusterer is asked")
            pictures.picture_cluster_embedding(output, models[0], arguments.method)
        case _:
            if features is not None:
                either = arguments.command == "embed"  # which needs no pairs
                found = load_features(features, arguments.csv, any_split=either)[:2]
                name = features.stem
                models = []  # the picture is of none
            else:
                found, name = models[0].test_features(), models[0].name
            if arguments.command == "histogram":
                draw_similarities(output, pair_similarities(*found))
            else:
                pictures.picture_embedding(output, *found, arguments.colour, arguments.method, name)
    return models


if __name__ == "__main__":
    sys.exit(main())
