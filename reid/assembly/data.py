"""Builds the datasets that a config names, and collects their training images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tabulate import tabulate

import reid.data.datasets  # noqa: F401  (importing the parts registers them)
from reid.assembly.specs import dataset_options
from reid.config_file import read_pairs
from reid.data.datasets.base import ReIDDataset
from reid.data.datasets.joining import JoinedImages, LeaveOut, join_images, unique_names
from reid.data.datasets.validation import ValidationSplit
from reid.registry import DATASET, ConfigError, build, check_type
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

logger = logging.getLogger(__name__)


def build_dataset(spec: Any, where: str) -> ReIDDataset:
    """Builds a dataset by name, without the images listed in the file of its `leave_out`.

    With `validation`, some of the training identities become its query and gallery; see
    `ValidationSplit`.

    Raises:
        ConfigError: The name is missing or unknown, or an option is wrong.
    """
    options, leave_out, validation = dataset_options(spec, where)
    dataset = cast(ReIDDataset, build(DATASET, options, where))
    try:
        if leave_out:
            dataset = LeaveOut(dataset, Path(leave_out))
        if validation is not None:
            split = _validation_options(validation, f"{where}.validation")
            dataset = ValidationSplit(dataset, **split)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error
    return dataset


def _validation_options(options: Any, where: str) -> dict[str, Any]:
    """The arguments of a `ValidationSplit`.

    Raises:
        ConfigError: An option is unknown, missing or of the wrong type.
    """
    known: dict[str, Any] = {"identities": int | float, "seed": int}
    unknown = set(options) - set(known) if isinstance(options, Mapping) else {"identities"}
    if unknown or "identities" not in options:
        raise ConfigError(
            f"{where}: expected {{IDENTITIES: a number or a share}} with an optional SEED, got "
            f"{options!r}"
        )
    return {key: check_type(value, known[key], f"{where}.{key}") for key, value in options.items()}


def spec_of_words(words: Sequence[str]) -> dict[str, Any]:
    """Turns `NAME KEY VALUE KEY VALUE` of a command line into a spec; values are YAML.

    Raises:
        ConfigError: The name or a value is missing, or a value is not YAML.
    """
    if not words:
        raise ConfigError("expected the name of a data set")
    return {"name": words[0], **{key.lower(): value for key, value in read_pairs(words[1:])}}


def build_datasets(specs: Any, where: str) -> list[ReIDDataset]:
    """Builds the datasets of a list, or a single dataset.

    Raises:
        ConfigError: A name is missing or unknown, or an option is wrong.
    """
    if not isinstance(specs, list) or not specs:
        return [build_dataset(specs, where)]
    return [build_dataset(spec, f"{where}[{i}]") for i, spec in enumerate(specs)]


class TrainImages:
    """The images of one training set, or of several joined.

    Args:
        datasets: One or more; beside sources, the target.
        sources: Labelled source domains; they come first.

    Attributes:
        datasets: The datasets that were passed in, the sources first.
        source_domains: Number of the sources.
        names: Their names, made unique.
        name: All names joined, for tables and messages.
    """

    def __init__(
        self, datasets: Sequence[ReIDDataset], sources: Sequence[ReIDDataset] = ()
    ) -> None:
        datasets = (*sources, *datasets)
        self.datasets = tuple(datasets)
        self.source_domains = len(sources)
        self.names = unique_names([dataset.name for dataset in datasets])
        self.name = " + ".join(self.names)
        self._joined: JoinedImages | None = None
        self._records: list[ImageRecord] | None = None

    @property
    def version(self) -> str:
        """The versions of the datasets on disk, which `load` detects."""
        return _versions(self.datasets)

    def load(self) -> list[ImageRecord]:
        """The images. If several datasets are joined, identities and cameras get new numbers.

        Raises:
            ConfigError: An image belongs to a source and to the target.
            DataError: The files are not what was expected, or camera numbers have large gaps.
        """
        if self._records is None:
            loaded = [dataset.load("train") for dataset in self.datasets]
            if self.source_domains:
                self._check_sources(loaded)
            self._records = loaded[0]
            if len(loaded) > 1:
                self._joined = join_images(list(zip(self.names, loaded, strict=True)))
                self._records = self._joined.records
                _log_joined(self.names, self._joined)
        return self._records

    @property
    def sources(self) -> tuple[ReIDDataset, ...]:
        """The labelled source domains."""
        return self.datasets[: self.source_domains]

    @property
    def targets(self) -> tuple[ReIDDataset, ...]:
        """The datasets that are no sources."""
        return self.datasets[self.source_domains :]

    def domains(self) -> list[tuple[str, str, list[ImageRecord]]]:
        """Name, version and images of the sources, if there are any, and of the others.

        Raises:
            ConfigError: An image belongs to a source and to the target.
            DataError: The files are not what was expected.
        """
        records, count = self.load(), self.source_domains
        if not count:
            return [(self.name, self.version, records)]
        parts = (slice(0, count), "source"), (slice(count, None), "target")
        return [
            (
                f"{' + '.join(self.names[part])} ({word})",
                _versions(self.datasets[part]),
                [record for record in records if (record.domain < count) == (word == "source")],
            )
            for part, word in parts
        ]

    def clustered(self) -> list[ImageRecord]:
        """The images that can be clustered: beside a source, the target's.

        Raises:
            ConfigError: An image belongs to a source and to the target.
            DataError: The files are not what was expected.
        """
        return [record for record in self.load() if record.domain >= self.source_domains]

    def _check_sources(self, loaded: Sequence[Sequence[ImageRecord]]) -> None:
        """Requires identities in each source, and no image that is in the target too."""
        target = {record.path for part in loaded[self.source_domains :] for record in part}
        for name, part in zip(self.names, loaded[: self.source_domains], strict=False):
            shared = [record.path for record in part if record.path in target]
            if shared:
                raise ConfigError(
                    f"datasets.source: {len(shared):,} images of {name} are in datasets.train too, "
                    f"such as {shared[0]}; source and target must be different data sets"
                )
            if not any(record.pid >= 0 for record in part):
                raise ConfigError(
                    f"datasets.source: no training image of {name} has an identity; a source must "
                    "be labelled"
                )

    def count_cameras(self) -> int:
        """The highest camera number plus 1; 0 = all cameras are unknown.

        Raises:
            DataError: The numbers have so large gaps that they must be a mistake.
        """
        camids = {record.camid for record in self.load()} - {UNKNOWN_CAMERA}
        count = max(camids, default=-1) + 1
        if count > 1000 + 10 * len(camids):
            raise DataError(
                f"{self.name}: a camera has the number {count - 1:,}, but there are only "
                f"{len(camids)} cameras; number them from 0"
            )
        return count

    def origin_of_camera(self, number: int) -> tuple[ReIDDataset, int]:
        """The data set of a camera, and the camera's number in it.

        Raises:
            DataError: The files are not what was expected.
        """
        self.load()
        if self._joined is None:
            return self.datasets[0], number
        source, there = self._joined.cameras[number]
        return self.datasets[self.names.index(source)], there


def hide_target_identities(
    records: Sequence[ImageRecord], source_domains: int
) -> list[ImageRecord]:
    """The records as training sees them: beside a source, those of the target are unlabelled.

    Args:
        records: Of all domains.
        source_domains: Number of the sources; 0: nothing is hidden.
    """
    return [
        replace(record, pid=UNLABELLED) if record.domain >= source_domains > 0 else record
        for record in records
    ]


def build_test_datasets(specs: Any, train: TrainImages | None) -> list[ReIDDataset]:
    """The listed test sets; if none is listed, the training sets that have query and gallery.

    Raises:
        ConfigError: A dataset is unknown, an option is wrong, or a validation split holds training
            images.
        DataError: The folder of a training set does not exist.
    """
    if specs:
        datasets = build_datasets(specs, "datasets.test")
    else:
        datasets = _with_test(train.targets) if train else []
    if train is not None:
        for dataset in datasets:
            if dataset.is_validation:
                _check_not_trained_on(dataset, train)
    return datasets


def build_source_tests(train: TrainImages) -> list[ReIDDataset]:
    """The sources that have query and gallery; warns about the others."""
    return _with_test(train.sources)


def _versions(datasets: Sequence[ReIDDataset]) -> str:
    return " + ".join(dataset.version for dataset in datasets if dataset.version)


def _with_test(datasets: Sequence[ReIDDataset]) -> list[ReIDDataset]:
    """The datasets that have query and gallery; warns about the others."""
    for dataset in datasets:
        missing = dataset.missing_splits().items()
        places = [f"{split} ({path})" for split, path in missing if split != "train"]
        if places:
            logger.warning(
                "%s has no %s, so it is not evaluated", dataset.name, " and no ".join(places)
            )
    return [dataset for dataset in datasets if dataset.has_test()]


def _check_not_trained_on(dataset: ReIDDataset, train: TrainImages) -> None:
    """Requires that a validation split is left out of training.

    Raises:
        ConfigError: Training uses some of its images.
    """
    trained = {record.path for record in train.load()}
    tested = [record.path for split in ("query", "gallery") for record in dataset.load(split)]
    shared = [path for path in tested if path in trained]
    if shared:
        raise ConfigError(
            f"datasets.train: training uses {len(shared):,} of the {len(tested):,} images of "
            f"{dataset.name}, such as {shared[0]}; give each training set that has these images "
            "the same VALIDATION"
        )


def _log_joined(names: Sequence[str], joined: JoinedImages) -> None:
    rows = []
    for name in names:
        pids = [number for number, (source, _) in enumerate(joined.identities) if source == name]
        camids = [number for number, (source, _) in enumerate(joined.cameras) if source == name]
        count = sum(record.source == name for record in joined.records)
        rows.append([name, f"{count:,}", _span(pids), _span(camids)])
    headers = ["dataset", "images", "identities", "cameras"]
    logger.info("Joined, with new numbers\n%s", tabulate(rows, headers=headers))


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
