"""Commands that use the list of a review."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from reid.files import printable
from reid.shipped import command
from reid.workflows.review.lists import LabelledSplits
from reid.workflows.review.source import Source

_SUPERVISED = (
    "LABELLER", "{NAME: Identities}", "CLUSTERER", "null", "HOOKS", "[]",
    "CRITERION", "[{NAME: CrossEntropy, SMOOTHING: 0.1}, {NAME: Triplet, MARGIN: 0.3}]",
    "DATALOADER.SAMPLER", "{NAME: PKSampler, BATCH_SIZE: 32, IMAGES_PER_IDENTITY: 4}",
)  # fmt: skip


def dataset_spec(labels: Path, outside: bool) -> str:
    """The list as a dataset of a config.

    Args:
        labels: The list.
        outside: Images lie outside the list's folder.
    """
    root = Path(os.environ.get("REID_DATASETS", "datasets"))
    path = os.path.relpath(os.path.abspath(labels), os.path.abspath(root))  # noqa: PTH100
    more = ", ALLOW_OUTSIDE: true" if outside else ""
    return f"{{NAME: CSV, PATH: {_quoted(path)}{more}}}"


def next_commands(
    source: Source, labels: Path, splits: LabelledSplits, outside: bool
) -> list[tuple[str, str]]:
    """(What it does, command) for the list; commands whose images are missing are left out."""
    spec = dataset_spec(labels, outside)
    start = [*command("train_net"), "--config-file", str(source.run / "config.yaml")]
    weights = ["MODEL.WEIGHTS", source.config.model.weights]
    name = str(source.run)
    found = []
    if splits.query:
        words = [*start, "--eval-only", *weights, "DATASETS.TEST", f"[{spec}]",
                 "OUTPUT_DIR", f"{name}_reviewed"]  # fmt: skip
        found.append(("Score the model on the labels", _line(words)))
    if splits.train_persons > 1:
        words = [*start, *weights, *_SUPERVISED, "DATASETS.TRAIN", spec,
                 "DATASETS.TEST", f"[{spec}]" if splits.query else "[]",
                 "OUTPUT_DIR", f"{name}_labels"]  # fmt: skip
        found.append(("Train further with the labels", _line(words)))
    return found


def _line(words: list[str]) -> str:
    return printable(shlex.join(words))


def _quoted(path: str) -> str:
    """As YAML inside braces."""
    plain = all(letter.isalnum() or letter in "_-./" for letter in path)
    return path if plain else "'" + path.replace("'", "''") + "'"
