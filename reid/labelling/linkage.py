"""Average linkage of all pairs of a given distance, in memory or on disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from reid.neighbors import Labels, row_blocks
from reid.structures import DataError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_IN_MEMORY = 1_000_000_000
_MIRRORED = 256


class Merges(NamedTuple):
    """The N - 1 merges of a hierarchy over N images.

    Attributes:
        first: (N - 1,) an image of one of the two clusters.
        second: (N - 1,) an image of the other.
        height: (N - 1,) their distance, ascending.
    """

    first: Labels
    second: Labels
    height: Doubles


@contextmanager
def pair_matrix(count: int, in_memory: int = _IN_MEMORY) -> Iterator[Floats]:
    """An (N, N) float32 array for the distances of all pairs, while the context lasts.

    Up to `in_memory` bytes (15,811 images) it lies in memory. A larger one is a temporary file in
    the system's folder for them (TMPDIR), 3.7 GB for 30,248 images: the system keeps as much of it
    in memory as is free. Rows are read and written one after the other, so a disk is fast enough.

    Raises:
        DataError: The disk has too little room.
    """
    size = 4 * count * count
    if size <= in_memory:
        yield np.zeros((count, count), np.float32)
        return
    with tempfile.TemporaryFile() as file:
        try:  # a file with holes would end the process when the disk is full
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: the distances of {count:,} images need {size / 1e9:.1f} "
                f"GB for a temporary file ({error.strerror}); make room, or set TMPDIR to another "
                "folder"
            ) from error
        yield np.memmap(file, np.float32, "r+", shape=(count, count))


def fill_upper_triangle(
    matrix: Floats, rows: Callable[[int, int], npt.NDArray[np.floating]]
) -> None:
    """Fills a matrix with the upper triangle of other rows, mirrored, and 0 on the diagonal.

    Agglomeration of a matrix that is not symmetric reads its upper triangle alone, as SciPy's and
    scikit-learn's do.

    Args:
        matrix: (N, N), filled in.
        rows: Gives the rows (b, N) from a start to a stop. It may read the upper triangle of its
            rows from `matrix` itself, which still has its old entries there.
    """
    for start, stop in row_blocks(len(matrix)):
        block = rows(start, stop).astype(np.float32)
        inner = np.triu(block[:, start:stop], 1)
        matrix[start:stop, start:stop] = inner + inner.T
        matrix[start:stop, stop:] = block[:, stop:]
        for low in range(stop, len(matrix), _MIRRORED):
            high = min(low + _MIRRORED, len(matrix))
            matrix[low:high, start:stop] = block[:, low:high].T


def average_linkage(matrix: Floats) -> Merges:
    """The hierarchy of unweighted average linkage (UPGMA), by chains of nearest neighbours.

    The merges are those of SciPy's `linkage(method="average")` apart from ties. SciPy needs two
    arrays of 8 bytes a pair, 7.3 GB for 30,248 images; here the matrix is all there is. A cluster's
    row is the sum of its images' rows; its distance to another cluster is the sum over the images
    of that cluster. So a merge adds two rows, and no column is touched. Time grows with N^2.

    Args:
        matrix: (N, N) symmetric distances, finite, 0 on the diagonal; used up.
    """
    count = len(matrix)
    first, second = np.empty(count - 1, np.int64), np.empty(count - 1, np.int64)
    height = np.empty(count - 1)
    _merge_all(matrix, first, second, height)
    order = np.argsort(height, kind="stable")
    return Merges(first[order], second[order], height[order])


def cut_to_clusters(merges: Merges, num_clusters: int) -> Labels:
    """Clusters (N,) from 0, numbered by their first image, after all but the last merges.

    Args:
        merges: Of N images.
        num_clusters: How many; all images are single if there are no more of them.
    """
    return _components(merges, max(0, len(merges.height) + 1 - num_clusters))


def cut_below(merges: Merges, limit: float) -> Labels:
    """Clusters (N,) from 0, numbered by their first image, after the merges below a distance."""
    return _components(merges, int(np.searchsorted(merges.height, limit)))


def distance_at_share(matrix: Floats, share: float) -> float:
    """Entry round(share x count), from 0, of the ascending distances above 0 of all pairs.

    Args:
        matrix: (N, N) distances, of which the upper triangle counts.
        share: From 0 to 1.

    Returns:
        The last entry if there is none at that place; 0 if all distances are 0.
    """
    high = np.zeros(1 << 16, np.int64)
    _count_bits(matrix, -1, high)
    count = int(high.sum())
    if not count:
        return 0.0
    place = min(round(share * count), count - 1)
    ends = np.cumsum(high)
    bucket = int(np.searchsorted(ends, place, "right"))
    low = np.zeros(1 << 16, np.int64)
    _count_bits(matrix, bucket, low)
    rest = place - int(ends[bucket] - high[bucket])
    bits = (bucket << 16) + int(np.searchsorted(np.cumsum(low), rest, "right"))
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _components(merges: Merges, taken: int) -> Labels:
    count = len(merges.height) + 1
    pairs = merges.first[:taken], merges.second[:taken]
    graph = coo_matrix((np.ones(taken, np.int8), pairs), (count, count))
    found: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


@njit(cache=True)
def _merge_all(rows: Floats, first: Labels, second: Labels, height: Doubles) -> None:
    count = len(rows)
    cluster = np.arange(count)  # a cluster has the number of one of its images
    size = np.ones(count)
    place = np.full(count, -1)  # of a cluster in the chain
    chain = np.empty(count, np.int64)
    sums = np.empty(count)
    length, oldest = 0, 0
    for done in range(count - 1):
        if length == 0:
            while size[oldest] == 0:
                oldest += 1
            chain[0], place[oldest], length = oldest, 0, 1
        while True:
            last = chain[length - 1]
            sums[:] = 0
            for image in range(count):
                sums[cluster[image]] += rows[last, image]
            nearest, least = -1, math.inf
            if length > 1:  # it wins if distances are equal
                nearest = chain[length - 2]
                least = sums[nearest] / (size[nearest] * size[last])
            for other in range(count):
                if size[other] > 0 and other != last:
                    distance = sums[other] / (size[other] * size[last])
                    if distance < least:
                        nearest, least = other, distance
            # Ties and rounding can lead back to an earlier place than the one before.
            if place[nearest] >= 0:
                break
            chain[length], place[nearest] = nearest, length
            length += 1
        start = place[nearest]
        for i in range(start, length):
            place[chain[i]] = -1
        length = start
        rows[nearest] += rows[last]
        for image in range(count):
            if cluster[image] == last:
                cluster[image] = nearest
        size[nearest] += size[last]
        size[last] = 0
        first[done], second[done], height[done] = last, nearest, least


@njit(parallel=True, cache=True)
def _count_bits(matrix: Floats, bucket: int, counts: Labels) -> None:
    """Counts the upper 16 bits of the entries above 0; of those in a bucket, the lower 16 bits."""
    count = len(matrix)
    parts = np.zeros((64, len(counts)), np.int64)
    for part in prange(64):
        for row in range(part, count, 64):
            bits = matrix[row].view(np.uint32)
            for column in range(row + 1, count):
                if matrix[row, column] > 0:
                    upper = bits[column] >> 16
                    if bucket < 0:
                        parts[part, upper] += 1
                    elif upper == bucket:
                        parts[part, bits[column] & 0xFFFF] += 1
    counts += parts.sum(0)
