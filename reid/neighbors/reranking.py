"""k-reciprocal re-ranking of a given distance, without an N x N array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit, prange

from reid.neighbors.jaccard import (
    average_encodings,
    by_columns,
    expanded_sets,
    half_length,
    jaccard_of_rows,
)
from reid.neighbors.kernels import Doubles, Indices, Labels, Offsets, insert_smaller
from reid.structures import ProgressBar, part_of_progress

if TYPE_CHECKING:
    import scipy.sparse

_BLOCK_BYTES = 64 * 2**20

DistanceColumns = Callable[[Labels], Doubles]
"""Distances d(k, i) of all N images k to some images i, as rows: (n,) images to (n, N) doubles.

For a symmetric distance these are the rows of its matrix.
"""


@dataclass(frozen=True)
class Reranked:
    """Re-ranked distances among N images; any rows of them are computed when they are asked for.

    Attributes:
        columns: The distance that was re-ranked.
        lowest: (N,) smallest entry of each of its columns (0 where none is subtracted).
        scale: (N,) what each column is then divided by, its largest entry.
        lambda_value: Weight of the scaled distance beside the Jaccard distance.
        encoding: (N, N) weights of each image on its expanded k-reciprocal set, by rows.
        encoding_columns: The same by columns.
    """

    columns: DistanceColumns
    lowest: Doubles
    scale: Doubles
    lambda_value: float
    encoding: scipy.sparse.csr_matrix
    encoding_columns: scipy.sparse.csc_matrix

    def __len__(self) -> int:
        return len(self.lowest)

    def rows(self, start: int, stop: int) -> Doubles:
        """The rows from `start` to `stop`, (stop - start, N)."""
        return self.take(np.arange(start, min(stop, len(self))))

    def take(self, images: Labels) -> Doubles:
        """The rows of some images, (n, N), in their order; the matrix is not symmetric."""
        result = _scaled(self.columns(images), self.lowest[images], self.scale[images])
        result *= self.lambda_value
        result += 1 - self.lambda_value
        jaccard = jaccard_of_rows(self.encoding[images], self.encoding_columns)
        row = np.repeat(np.arange(len(images)), np.diff(jaccard.indptr))
        result[row, jaccard.indices] += (1 - self.lambda_value) * (jaccard.data - 1)
        return result

    def blocks(self) -> Iterator[tuple[int, Doubles]]:
        """All rows, in blocks of about 64 MB, as pairs (first row, rows)."""
        for start, stop in row_blocks(len(self)):
            yield start, self.rows(start, stop)


def rerank_distances(
    columns: DistanceColumns,
    count: int,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    subtract_minimum: bool = True,
    progress: ProgressBar | None = None,
) -> Reranked:
    """Re-ranks any distance as Zhong et al. (CVPR 2017) do, in the form of IICS, MGH and st-ReID.

    Each column of the distance is shifted to a minimum of 0 and divided by its largest entry,
    then the matrix is transposed: D. Lists have k1 + 1 entries by ascending D (of equal ones the
    lower index first; an image need not stand in its own list), half lists round(k1 / 2) + 1.
    Weights are exp(-D) on the expanded k-reciprocal set, of sum 1, averaged over the first k2 of
    the list. Result: (1 - lambda) * Jaccard distance + lambda * D. Nothing is squared, and all of
    it is computed in double precision (the published code of IICS and MGH keeps the weights in
    half precision, which is wrong by up to 3e-3).

    The distance is computed twice here, and once more whenever rows of the result are asked for.
    At 32,621 images a block takes 64 MB, and the weights of all images about 100 MB.

    Args:
        columns: The distance, as blocks of columns; it need not be symmetric.
        count: Images, N > 0. Lists are at most as long as the set.
        k1: Length of the neighbour lists without the image itself.
        k2: Rows averaged in the local query expansion; 1 = none.
        lambda_value: Weight of D, from 0 to 1.
        subtract_minimum: Shift each column to a minimum of 0 (st-ReID does not).
        progress: Called with (images' worth of work done, N).

    Raises:
        ValueError: An argument is out of its range, or a distance is not finite.
    """
    if count < 1 or k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise ValueError(
            "expected count, k1 and k2 of 1 or more and lambda_value from 0 to 1, got "
            f"{count}, {k1}, {k2}, {lambda_value}"
        )
    ranking, weighing = (part_of_progress(progress, count, *p) for p in ((0, 0.5), (0.5, 1)))
    lowest, scale = np.zeros(count), np.empty(count)
    lists = np.empty((count, min(max(k1 + 1, k2), count)), np.int32)
    for start, stop in row_blocks(count):
        block = _block(columns, start, stop, count)
        if subtract_minimum:
            lowest[start:stop] = block.min(1)
        scale[start:stop] = block.max(1) - lowest[start:stop]
        block = _scaled(block, lowest[start:stop], scale[start:stop])
        smallest_of_rows(block, lists[start:stop])
        if ranking is not None:
            ranking(stop, count)
    neighbors = np.ascontiguousarray(lists[:, : k1 + 1])
    indptr, indices = expanded_sets(neighbors, half_length(k1, count))
    weights = np.empty(len(indices))
    for start, stop in row_blocks(count):
        block = _block(columns, start, stop, count)
        block = _scaled(block, lowest[start:stop], scale[start:stop])
        _exponential_weights(block, start, indptr, indices, weights)
        if weighing is not None:
            weighing(stop, count)
    encoding = average_encodings(indptr, indices, weights, lists[:, :k2]).csr()
    return Reranked(columns, lowest, scale, lambda_value, encoding, by_columns(encoding))


def row_blocks(count: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of rows of an N x N matrix of doubles, each about 64 MB."""
    height = max(1, _BLOCK_BYTES // (8 * count))
    for start in range(0, count, height):
        yield start, min(start + height, count)


def smallest_of_rows(block: Doubles, lists: Indices) -> None:
    """Fills in the k columns with the smallest entries of each row, smallest first.

    Of equal entries the lower column comes first.

    Args:
        block: (n, N).
        lists: (n, k), to be filled; k is at most N.
    """
    _smallest_of_rows(np.ascontiguousarray(block), lists)


def _block(columns: DistanceColumns, start: int, stop: int, count: int) -> Doubles:
    """Some columns of the distance, checked."""
    block = columns(np.arange(start, stop))
    if block.shape != (stop - start, count):
        raise ValueError(
            f"columns: expected an array of shape {(stop - start, count)}, got {block.shape}"
        )
    if not np.isfinite(block).all():
        raise ValueError("columns: expected finite distances, got NaN or infinity")
    return block


def _scaled(block: Doubles, lowest: Doubles, scale: Doubles) -> Doubles:
    """Columns of the distance, shifted and divided; where all entries are equal, 0."""
    divisors = np.where(scale > 0, scale, 1)
    result: Doubles = (block - lowest[:, None]) / divisors[:, None]
    return result


@njit(parallel=True, cache=True)
def _smallest_of_rows(block: Doubles, lists: Indices) -> None:
    for row in prange(len(block)):
        k = lists.shape[1]
        best = np.full(k, np.inf)
        lists[row] = -1
        for column in range(block.shape[1]):
            value = block[row, column]
            if value < best[k - 1]:
                insert_smaller(value, column, best, lists[row])


@njit(parallel=True, cache=True)
def _exponential_weights(
    block: Doubles, first: int, indptr: Offsets, indices: Indices, weights: Doubles
) -> None:
    """The weights exp(-D) of the images from `first` on, of sum 1."""
    for row in prange(len(block)):
        start, stop = indptr[first + row], indptr[first + row + 1]
        total = 0.0
        for place in range(start, stop):
            weights[place] = np.exp(-block[row, indices[place]])
            total += weights[place]
        for place in range(start, stop):
            weights[place] /= total
