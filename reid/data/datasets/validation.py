"""A validation split by identity: some identities of the training images become a test."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from reid.data.datasets.base import ReIDDataset, Split
from reid.data.datasets.joining import PartOfDataset
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

logger = logging.getLogger(__name__)


class ValidationSplit(PartOfDataset):
    """A labelled training set, some of whose identities are its query and gallery.

    It serves to choose the best epoch, thresholds and settings without the test set. Training loses
    only these identities' images: unlabelled images stay, and so do identities that only one camera
    has seen, which cannot be queries.

    As in Market-1501 (Zheng et al., ICCV 2015) each identity has one query for each camera, and its
    other images are the gallery. Where that leaves a query without a match from another camera, as
    in a set with one image for each identity and camera, half of the identity's cameras that have
    a single image give it to the gallery instead.

    The choice depends on the seed, the identities' numbers and the images' names, not on their
    order: one more identity in the set changes at most one of the chosen identities.

    Args:
        dataset: Its training images are split; its own query and gallery are not used.
        identities: How many, or from 0 to 1 the share of those that can be queries, rounded.
        seed: Each seed chooses other identities and other queries.

    Raises:
        ValueError: `identities` is out of its range.
    """

    is_validation = True

    def __init__(self, dataset: ReIDDataset, identities: float, seed: int = 1) -> None:
        super().__init__(dataset)
        if not identities > 0 or (isinstance(identities, float) and identities >= 1):
            raise ValueError(
                "validation.identities: expected a number of identities, 1 or more, or a share "
                f"above 0 and below 1, got {identities}"
            )
        self._identities = identities
        self._seed = seed
        self._splits: Mapping[Split, list[ImageRecord]] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]  # other datasets set an attribute
        """The dataset's name and the options of the split."""
        return f"{self._dataset.name}-validation-{self._identities:g}-seed{self._seed}"

    def load(self, split: Split) -> list[ImageRecord]:
        """The images of a split, in the dataset's order.

        Raises:
            DataError: The dataset cannot be loaded, has too few identities, or no image is left.
        """
        if self._splits is None:
            self._splits = self._split(self._dataset.load("train"))
        return self._splits[split]

    def has_test(self) -> bool:
        """Whether there are training images to make query and gallery of."""
        return self.has_train()

    def missing_splits(self) -> Mapping[Split, Path]:
        """The training split, if it is missing; the dataset's query and gallery are not needed."""
        missing = self._dataset.missing_splits()
        return {split: path for split, path in missing.items() if split == "train"}

    def _split(self, records: Sequence[ImageRecord]) -> Mapping[Split, list[ImageRecord]]:
        of_identity: dict[int, list[int]] = defaultdict(list)
        for number, record in enumerate(records):
            if record.pid != UNLABELLED:
                of_identity[record.pid].append(number)
        drawn = self._draw(records, of_identity)
        roles: dict[int, Split] = {}
        for pid in drawn:
            roles |= self._roles(records, of_identity[pid])
        splits: dict[Split, list[ImageRecord]] = {"train": [], "query": [], "gallery": []}
        for number, record in enumerate(records):
            splits[roles.get(number, "train")].append(record)
        logger.info(
            "%s: %s of %s identities are set aside for validation (seed %d): %s queries, %s "
            "gallery images. That costs training %s of its %s images (%.1f %%)",
            self._dataset.name,
            f"{len(drawn):,}",
            f"{len(of_identity):,}",
            self._seed,
            f"{len(splits['query']):,}",
            f"{len(splits['gallery']):,}",
            f"{len(roles):,}",
            f"{len(records):,}",
            100 * len(roles) / len(records),
        )
        if not splits["train"]:
            raise DataError(
                f"{self._dataset.name}: validation takes all {len(records):,} images and leaves "
                "none to train on; lower validation.identities"
            )
        return splits

    def _draw(
        self, records: Sequence[ImageRecord], of_identity: Mapping[int, Sequence[int]]
    ) -> list[int]:
        """The identities that are chosen for validation."""
        able = [
            pid
            for pid, numbers in of_identity.items()
            if _can_be_asked([records[number].camid for number in numbers])
        ]
        count = self._identities
        if isinstance(count, float):
            count = max(round(count * len(able)), 1)
        if count > len(able):
            raise DataError(
                f"{self._dataset.name}: validation needs {count:,} identities that two cameras "
                f"have seen (or that have two images of unknown cameras), but only {len(able):,} "
                f"of the {len(of_identity):,} training identities qualify; lower "
                "validation.identities"
            )
        return sorted(able, key=lambda pid: (self._rank(str(pid)), pid))[: int(count)]

    def _roles(self, records: Sequence[ImageRecord], numbers: Sequence[int]) -> dict[int, Split]:
        """Query or gallery for each image of an identity."""
        by_camera: dict[int, list[int]] = defaultdict(list)
        for number in self._ordered(records, numbers):
            by_camera[records[number].camid].append(number)
        queries = {camid: images[0] for camid, images in by_camera.items()}
        in_gallery = {camid for camid, images in by_camera.items() if len(images) > 1}
        if not all(in_gallery - ({camid} - {UNKNOWN_CAMERA}) for camid in queries):
            # `queries` has the order of `_ordered`, so this choice depends on the seed too.
            single = [camid for camid in queries if camid not in in_gallery]
            for camid in single[: -(-len(single) // 2)]:
                del queries[camid]
        asked = set(queries.values())
        return {number: "query" if number in asked else "gallery" for number in numbers}

    def _ordered(self, records: Sequence[ImageRecord], numbers: Sequence[int]) -> list[int]:
        def place(number: int) -> tuple[bytes, str, int]:
            path = records[number].path
            return self._rank(PurePath(path).name), path, number

        return sorted(numbers, key=place)

    def _rank(self, text: str) -> bytes:
        """A sort key: a random order that depends on the seed alone."""
        return hashlib.sha256(f"{self._seed}/{text}".encode(errors="surrogateescape")).digest()


def _can_be_asked(camids: Sequence[int]) -> bool:
    """Whether an identity can have a query and a match for it."""
    return len(set(camids)) > 1 or camids.count(UNKNOWN_CAMERA) > 1
