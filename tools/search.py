#!/usr/bin/env python
"""Finds persons in a gallery of crops: build one, add to it, remove from it, query it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reid.engine.logs import tool_logging
from reid.engine.stopping import Interrupted
from reid.files import say
from reid.workflows.errors import tells_errors
from reid.workflows.search import output, upkeep
from reid.workflows.search.features import ModelChoice
from reid.workflows.search.gallery import read_gallery
from reid.workflows.search.query import Found, QuerySettings, search

EPILOG = """\
  python tools/search.py build people crops/ --model logs/run
  python tools/search.py build people crops.npz --index hnsw     # features of tools/extract.py
  python tools/search.py add people more_crops/
  python tools/search.py remove people crops/old --pattern '*_blurred.jpg'
  python tools/search.py query people person.jpg --picture found.png --csv found.csv

`people` is a folder for the gallery alone. It remembers its model, so a query needs no config.
docs/search.md has more examples.
"""


@tells_errors(ValueError)
@tool_logging()
def main() -> int:
    """Parses the arguments and does what they ask for; returns the exit code."""
    arguments = parse()
    gallery = arguments.gallery
    try:
        match arguments.command:
            case "build":
                said = str(upkeep.build(
                    gallery, arguments.sources, choice_of(arguments), index=arguments.index,
                    replace_old=arguments.overwrite,
                ))  # fmt: skip
            case "add":
                said = str(upkeep.add(gallery, arguments.sources, choice_of(arguments)))
            case "remove":
                said = str(upkeep.remove(gallery, arguments.paths, arguments.pattern))
            case "info":
                said = upkeep.describe(read_gallery(gallery))
            case _:
                found = search(
                    gallery, arguments.sources, choice_of(arguments), settings_of(arguments)
                )
                said = "\n".join([output.text_of(found), *written(found, arguments)])
    except Interrupted as stop:
        sys.stderr.write(f"{stop}; the gallery has not changed; the same command goes on\n")
        return stop.exit_code
    say(said)
    return 0


def written(found: Found, arguments: argparse.Namespace) -> list[str]:
    """Writes the files that were asked for; returns a line for each."""
    writers = (
        (arguments.csv, output.write_csv),
        (arguments.json, output.write_json),
        (arguments.picture, output.write_picture),
    )
    lines = []
    for path, write in writers:
        if path is not None:
            write(path, found)
            lines.append(f"Written to {path}")
    return lines


def choice_of(arguments: argparse.Namespace) -> ModelChoice:
    """The model that makes features."""
    return ModelChoice(
        arguments.model, arguments.weights, arguments.device, arguments.batch_size,
        arguments.workers, arguments.camera_folders, arguments.camera or "",
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace) -> QuerySettings:
    """What a query asks for."""
    cameras = "same" if arguments.same_camera else "other" if arguments.other_cameras else "all"
    return QuerySettings(
        arguments.top, arguments.rerank, arguments.k1, arguments.k2, arguments.lambda_value,
        cameras, arguments.false_per_million,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("build", "make a gallery of crops, or of a file of features"),
        ("add", "add crops or features to a gallery"),
        ("remove", "take images out of a gallery; their files stay"),
        ("query", "find the images that are most similar to some pictures"),
        ("info", "show what a gallery holds"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("gallery", type=Path, metavar="GALLERY", help="its folder")
        if name in ("build", "add", "query"):
            add_sources(command)
        if name == "build":
            command.add_argument(
                "--index", choices=("exact", "hnsw", "ivfpq"), default="exact",
                help="how it is searched: all compared, by a graph, or by compressed features "
                "(default: %(default)s)",
            )  # fmt: skip
            command.add_argument(
                "--overwrite", action="store_true", help="replace a gallery that is there"
            )
        if name == "remove":
            command.add_argument(
                "paths", nargs="*", metavar="PATH", help="image, or folder with all below it"
            )
            command.add_argument(
                "--pattern", action="append", default=[], metavar="GLOB",
                help="of whole paths or names of files, such as '*_blurred.jpg'; may be repeated",
            )  # fmt: skip
        if name == "query":
            add_settings(command)
    arguments = parser.parse_args()
    if arguments.command == "query":
        named = [
            path for path in (arguments.csv, arguments.json, arguments.picture) if path is not None
        ]
        if len({path.absolute() for path in named}) < len(named):
            parser.error("--csv, --json and --picture: two of them are one file")
    return arguments


def add_sources(command: argparse.ArgumentParser) -> None:
    """Which images, and what makes their features."""
    command.add_argument(
        "sources", nargs="+", type=Path, metavar="PATH",
        help="folder (all images below), list (.csv with a header, or .txt, one path per line), "
        "picture, or a file of tools/extract.py (.npz, .safetensors)",
    )  # fmt: skip
    command.add_argument(
        "--model", type=Path, metavar="MODEL",
        help="folder of a run, config, .safetensors or .onnx (default: the gallery's)",
    )  # fmt: skip
    command.add_argument("--weights", type=Path, help="in place of the run's or the config's")
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: from the config)")
    command.add_argument("--batch-size", type=int, help="images at once (default: from the config)")
    command.add_argument(
        "--workers", type=int, default=4, help="processes that read images (default: %(default)s)"
    )
    cameras = command.add_mutually_exclusive_group()
    cameras.add_argument("--camera", metavar="NAME", help="of all these images")
    cameras.add_argument(
        "--camera-folders", action="store_true",
        help="the first folder below each PATH is the camera's name",
    )  # fmt: skip


def add_settings(command: argparse.ArgumentParser) -> None:
    """What is looked for, and where it is written."""
    command.add_argument("--top", type=int, default=10, help="answers each (default: %(default)s)")
    command.add_argument(
        "--rerank", type=int, default=0, metavar="N",
        help="sort the first N answers again by k-reciprocal re-ranking",
    )  # fmt: skip
    command.add_argument("--k1", type=int, default=20, help="of re-ranking (default: %(default)s)")
    command.add_argument("--k2", type=int, default=6, help="of re-ranking (default: %(default)s)")
    command.add_argument(
        "--lambda", type=float, default=0.3, dest="lambda_value", metavar="L",
        help="weight of the first distance in re-ranking (default: %(default)s)",
    )  # fmt: skip
    cameras = command.add_mutually_exclusive_group()
    cameras.add_argument(
        "--same-camera", action="store_true", help="search only the query's camera"
    )
    cameras.add_argument("--other-cameras", action="store_true", help="search only other cameras")
    command.add_argument(
        "--false-per-million", type=float, metavar="RATE",
        help="mark answers as the same person at the threshold with this many false matches per "
        "million pairs (default: the one that tools/thresholds.py recommends)",
    )  # fmt: skip
    for name, text in (
        ("csv", "a line for each answer"),
        ("json", "all that was found"),
        ("picture", "a PNG of ranked lists"),
    ):
        command.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)


if __name__ == "__main__":
    sys.exit(main())
