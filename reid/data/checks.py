"""Checks of a data set: whether its labels can be right, and whether its images are usable."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
from PIL import Image

from reid.data.datasets.base import Split
from reid.data.images import read_image_noting
from reid.files import open_regular
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

Splits = Mapping[Split, Sequence[ImageRecord]]

KINDS: Mapping[str, str] = {
    "unreadable": "no image, cut off, or not there",
    "zero-size": "a file of 0 bytes",
    "tiny": "a side shorter than the smallest allowed",
    "duplicate": "the same file as another one, or listed twice",
    "no-match": "a query whose identity no other camera of the gallery has seen",
    "shared-image": "a query that lies in the gallery too; ranking leaves it out of its own list",
    "damaged": "read, but its decoder complains: parts may be missing",
    "near-duplicate": "almost the same picture as another one",
    "grey": "no colour",
    "blank": "one even area",
    "one-camera": "an identity that one camera alone has seen",
    "shared-identity": "an identity of training that the test has too",
}
"""Kinds of findings, and what they mean."""

WRONG = ("unreadable", "zero-size", "tiny", "duplicate", "no-match")
"""Kinds that make a data set wrong; the others are worth a look but may be as intended."""

_THUMBNAIL = (16, 8)
_HASH = (9, 8)  # columns, rows: 8 differences in each of 8 rows
_BITS = 64
_HASH_DISTANCE = 3
_NEAR = 3.0
_BLANK = 2.0
_GREY = 8


@dataclass(frozen=True)
class Finding:
    """Something found about an image or an identity.

    Attributes:
        kind: A key of `KINDS`.
        split: The split that it is in.
        subject: Path of the image, or the identity.
        detail: What exactly, in words.
        leave_out: Whether the image should be left out of the data set.
    """

    kind: str
    split: Split
    subject: str
    detail: str
    leave_out: bool = False


@dataclass(frozen=True)
class _Facts:
    """What is known of one image file; `digest` is None if it cannot be read."""

    finding: tuple[str, str] | None
    digest: bytes | None
    complaint: str = ""
    grey: bool = False
    blank: bool = False
    hash: bytes = b""
    thumbnail: npt.NDArray[np.uint8] | None = None

    def findings(self, split: Split, path: str) -> Iterator[Finding]:
        """What is wrong or odd about the file by itself."""
        if self.finding is not None:
            yield Finding(self.finding[0], split, path, self.finding[1], leave_out=True)
        if self.complaint:
            yield Finding("damaged", split, path, self.complaint)
        if self.grey:
            yield Finding("grey", split, path, KINDS["grey"])
        if self.blank:
            yield Finding("blank", split, path, KINDS["blank"])


def check_labels(splits: Splits, *, same_numbers: bool = True) -> list[Finding]:
    """Identities and cameras that cannot be right, or that a protocol cannot use.

    Args:
        splits: Images of each split.
        same_numbers: Whether an identity has one number in training and test; see `ReIDDataset`.

    Returns:
        `no-match` for queries that no gallery image can answer: none has the query's identity, or
        the query's own camera alone (where it is known) has seen it. `one-camera` for identities of
        training that one camera alone has seen, where cameras are known. `shared-identity` for
        identities of training that are among the queries too, if `same_numbers`; benchmarks have
        none.
    """
    found: list[Finding] = []
    cameras: dict[int, set[int]] = defaultdict(set)
    for record in splits.get("gallery", ()):
        cameras[record.pid].add(record.camid)
    for record in splits.get("query", ()):
        seen = cameras.get(record.pid, set()) if record.pid != UNLABELLED else set()
        if record.camid != UNKNOWN_CAMERA:
            seen = seen - {record.camid}
        if not seen:
            why = f"identity {record.pid}, camera {record.camid}"
            found.append(Finding("no-match", "query", record.path, why, leave_out=True))
    trained: dict[int, set[int]] = defaultdict(set)
    for record in splits.get("train", ()):
        if record.pid != UNLABELLED:
            trained[record.pid].add(record.camid)
    for pid, camids in sorted(trained.items()):
        if len(camids) == 1 and UNKNOWN_CAMERA not in camids:
            found.append(Finding("one-camera", "train", str(pid), f"camera {min(camids)} alone"))
    if same_numbers:
        shared = {record.pid for record in splits.get("query", ())} & trained.keys()
        found.extend(
            Finding("shared-identity", "query", str(pid), "in training too")
            for pid in sorted(shared)
        )
    return found


def check_paths(splits: Splits) -> list[Finding]:
    """Images that are listed more than once, by their paths alone: no file is opened.

    The findings are those of `check_images`, which also recognises copies under other names.
    """
    return sort_findings(
        finding
        for copies in _places(splits).values()
        if len(copies) > 1
        for finding in _duplicates(copies)
    )


def check_images(
    splits: Splits,
    *,
    min_side: int = 16,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Reads every image once; finds those that are broken, odd, or present twice.

    Files are the same if their bytes are. Of copies with different identities or cameras, all
    should be left out; of an image that the test has too, the copy in training; of other copies,
    all but the first. A file that a split lists twice with the same labels is a duplicate too, but
    is not to be left out: a list of paths would drop both. A query that is also in the gallery,
    under the same identity and a known camera, is noted but no fault: the protocol removes it there
    (VeRi-776 and CUHK03 have some).

    Pictures are nearly the same if 61 of the 64 bits of their difference hash agree (is a pixel
    brighter than its right neighbour, at 9 x 8 pixels) and their thumbnails of 8 x 16 pixels differ
    by at most 3 grey levels on average. Frames of one track often are; across identities they are
    worth a look.

    Args:
        splits: Images of each split; a file in several of them is read once.
        min_side: Shortest side in pixels that is not `tiny`.
        workers: Threads.
        progress: Called with the number of images read since the last call.

    Returns:
        Findings, by kind in the order of `KINDS`, then split, then path.
    """
    places = _places(splits)
    facts = _look_at_all([*places], min_side, workers, progress)
    found: list[Finding] = []
    for path, seen in facts.items():
        found.extend(seen.findings(places[path][0][0], path))
    first_of: dict[bytes, list[str]] = defaultdict(list)
    for path, seen in facts.items():
        if seen.digest is not None:
            first_of[seen.digest].append(path)
    for paths in first_of.values():
        copies = [place for path in paths for place in places[path]]
        if len(copies) > 1:
            found.extend(_duplicates(copies))
    different = [paths[0] for paths in first_of.values() if not facts[paths[0]].blank]
    for one, other in _near_pairs([facts[path] for path in different]):
        split, record = places[different[other]][0]
        before, same = places[different[one]][0]
        detail = f"looks like {different[one]}{_unlike(record, same)}"
        if {before, split} == {"train", "query"} or {before, split} == {"train", "gallery"}:
            detail += f", which is in {before}"
        found.append(Finding("near-duplicate", split, different[other], detail))
    return sort_findings(found)


def _look_at_all(
    paths: Sequence[str], min_side: int, workers: int, progress: Callable[[int], None] | None
) -> dict[str, _Facts]:
    """The facts of each image, in the order of the paths."""
    facts = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            looks = pool.map(lambda path: _look_at(path, min_side), paths)
            for path, seen in zip(paths, looks, strict=True):
                facts[path] = seen
                if progress is not None:
                    progress(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return facts


def _places(splits: Splits) -> dict[str, list[tuple[Split, ImageRecord]]]:
    """Where each file is listed."""
    places: dict[str, list[tuple[Split, ImageRecord]]] = defaultdict(list)
    for split, records in splits.items():
        for record in records:
            places[record.path].append((split, record))
    return places


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """By kind in the order of `KINDS`, split, and subject."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda one: (order[one.kind], one.split, one.subject, one.detail))


def count_by_camera(splits: Splits) -> dict[int, dict[Split, int]]:
    """Images of each camera (-1 = unknown) in each split."""
    table: dict[int, dict[Split, int]] = {}
    for split, records in splits.items():
        for camid, count in Counter(record.camid for record in records).items():
            table.setdefault(camid, {})[split] = count
    return dict(sorted(table.items()))


def _look_at(path: str, min_side: int) -> _Facts:
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                return _Facts(("zero-size", KINDS["zero-size"]), None)
        pixels, complaint = read_image_noting(path)  # too large a picture raises an error
        with open_regular(path) as file:
            digest = hashlib.sha256(file.read()).digest()
    except (OSError, DataError) as error:
        return _Facts(("unreadable", str(error).removeprefix(f"{path}: ")), None)
    height, width = pixels.shape[:2]
    small = None
    if min(height, width) < min_side:
        small = ("tiny", f"{height} x {width} pixels")
    spread = pixels.max(2).astype(np.int16) - pixels.min(2)
    luminance = Image.fromarray(pixels).convert("L")
    thumbnail = np.asarray(luminance.resize(_THUMBNAIL[::-1], Image.Resampling.BOX))
    rows = np.asarray(luminance.resize(_HASH, Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(rows[:, :-1] > rows[:, 1:]).tobytes()
    blank = float(np.asarray(luminance).std()) < _BLANK
    grey = not blank and int(spread.max()) <= _GREY
    return _Facts(small, digest, complaint, grey, blank, bits, thumbnail)


def _duplicates(copies: Sequence[tuple[Split, ImageRecord]]) -> list[Finding]:
    """What is wrong with several records of the same bytes, of one file or of several."""
    tested = [one for one in copies if one[0] != "train"]
    asked = [record.path for split, record in tested if split == "query"]
    by_labels: dict[tuple[int, int], tuple[Split, ImageRecord]] = {}
    for split, record in tested or copies:
        by_labels.setdefault((record.pid, record.camid), (split, record))
    first: dict[Split, str] = {}
    found: list[Finding] = []
    for split, record in copies:
        path, labels = record.path, (record.pid, record.camid)
        if split == "train" and tested:
            where, other = tested[0]
            detail = f"in {where} too: {other.path}{_unlike(record, other)}"
            leave_out = True
        elif len(by_labels) > 1:
            where, other = next(one for key, one in by_labels.items() if key != labels)
            detail = (
                f"identity {record.pid}, camera {record.camid}; as {other.path} in {where} "
                f"identity {other.pid}, camera {other.camid}"
            )
            leave_out = True
        elif split in first:
            leave_out = path != first[split]  # a path cannot leave out one of two lines
            detail = f"the same file as {first[split]}" if leave_out else "is listed again"
        else:
            first[split] = path
            if split != "gallery" or not asked:
                continue
            if record.camid != UNKNOWN_CAMERA:
                found.append(Finding("shared-image", split, path, f"is the query {asked[0]}"))
                continue
            detail, leave_out = f"is the query {asked[0]}, of no camera", path != asked[0]
        found.append(Finding("duplicate", split, path, detail, leave_out))
    return found


def _unlike(record: ImageRecord, other: ImageRecord) -> str:
    return "" if record.pid == other.pid else f", of identity {other.pid} and not {record.pid}"


def _near_pairs(facts: Sequence[_Facts]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of pictures that look alike; a picture is `later` at most once."""
    if len(facts) < 2:
        return []
    hashes = np.frombuffer(b"".join(one.hash for one in facts), np.uint8).reshape(-1, _BITS // 8)
    thumbnails = np.stack([one.thumbnail for one in facts if one.thumbnail is not None])
    # Hashes that differ in at most three bits agree in at least one of their four quarters.
    index = faiss.IndexBinaryMultiHash(_BITS, _HASH_DISTANCE + 1, _BITS // (_HASH_DISTANCE + 1))
    index.add(hashes)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(facts), 4096):
        part = hashes[start : start + 4096]
        limits, _, found = index.range_search(part, _HASH_DISTANCE + 1)  # faiss excludes the bound
        for row in range(len(part)):
            later = start + row
            others = np.unique(found[limits[row] : limits[row + 1]])
            others = others[others < later]
            differences = np.abs(
                thumbnails[others].astype(np.int16) - thumbnails[later].astype(np.int16)
            ).mean(axis=(1, 2))
            near = others[differences <= _NEAR]
            if len(near):
                pairs.append((int(near[0]), later))
    return pairs
