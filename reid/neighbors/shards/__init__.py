"""DBSCAN on Jaccard distances of more rows than memory holds, by the processes of one machine.

All arrays lie in a folder and are mapped into memory, so that processes share them and the system
keeps in memory what fits. A process itself takes memory for two blocks of candidates, whatever the
number of rows. Steps go through the rows in blocks; every finished block is noted, so that a killed
run goes on where it was, with any number of processes.

Labels are those of `jaccard_distance` and `dbscan` in memory, to the bit if the search is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reid.neighbors.density import dbscan_of_blocks
from reid.neighbors.jaccard import half_length
from reid.neighbors.kernels import Floats, Labels
from reid.neighbors.shards.folder import WorkFolder
from reid.neighbors.shards.inverted import ShardedInvertedFile
from reid.neighbors.shards.jaccard import ShardedJaccard
from reid.neighbors.shards.search import ListLengths, ShardedSearch
from reid.neighbors.shards.steps import ROWS, BlocksDone, Shards, Step

__all__ = ["BlocksDone", "ShardSettings", "Shards", "WorkFolder", "cluster_in_shards"]

_SEARCHES = {"exact": ShardedSearch, "ivf": ShardedInvertedFile}
_SLACK = 1e-5  # above DBSCAN's tolerance, so that no distance that counts is left out


@dataclass(frozen=True)
class ShardSettings:
    """How rows are clustered, and in what blocks.

    Attributes:
        k1: As in `JaccardDBSCAN`, and so are the next three.
        k2: Rows averaged.
        eps: From 0 to below 1.
        min_samples: Neighbours that make a core point.
        memory: Bytes that the candidates of a process may take. It decides the size of blocks,
            which is not changed later, and not the labels.
        block_rows: Most rows of a block, in place of what the memory allows.
        half_precision: As in `nearest_neighbors`.
        dims: As in `nearest_neighbors`; of an exact search.
        search: `exact`, or `ivf`: see `approximate_neighbors`.

    Raises:
        ValueError: A number is out of its range.
    """

    k1: int = 20
    k2: int = 6
    eps: float = 0.5
    min_samples: int = 4
    memory: float = 1e9
    block_rows: int | None = None
    half_precision: bool | None = None
    dims: int | None = None
    search: Literal["exact", "ivf"] = "exact"

    def __post_init__(self) -> None:
        for name in ("k1", "k2", "min_samples"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps: expected 0 < eps < 1, got {self.eps}")
        if self.search not in _SEARCHES:
            raise ValueError(f"search: expected {' or '.join(_SEARCHES)}, got {self.search!r}")
        if not 0 < self.memory < math.inf:
            raise ValueError(f"memory: expected more than 0 bytes, got {self.memory:g}")

    def lengths(self, count: int) -> ListLengths:
        """Of the lists of `count` rows."""
        return ListLengths(min(self.k1, count), half_length(self.k1, count), min(self.k2, count))


def cluster_in_shards(shards: Shards, rows: Floats, settings: ShardSettings) -> Labels:
    """Clusters the rows; every process must call it.

    Args:
        shards: The processes, in a folder of rows and settings that are the same.
        rows: (N, D) float32 unit vectors, contiguous, mapped into memory.
        settings: Of the clustering.

    Returns:
        (N,) int64 clusters from 0, -1 = outlier, in a file of the folder.

    Raises:
        BlocksDone: As many blocks as were wanted are done.
        OutputError: The disk is full.
        ValueError: A row is not finite, or not of unit length.
    """
    count = len(rows)
    lengths = settings.lengths(count)
    search = _SEARCHES[settings.search](
        shards, rows, lengths, settings.memory, block_rows=settings.block_rows,
        half_precision=settings.half_precision, dims=settings.dims,
    )  # fmt: skip
    search.run()
    jaccard = ShardedJaccard(
        shards, rows, lengths, min(settings.eps + _SLACK, 1.0), settings.block_rows or ROWS,
        search.blocks,
    )  # fmt: skip
    jaccard.run()

    def label(_: int) -> None:
        shards.folder.array("labels")[:] = dbscan_of_blocks(
            jaccard.pieces, count, settings.eps, settings.min_samples
        )

    shards.run(Step("labels", "Clusters", 1, label, lambda: {"labels": ((count,), np.int64)},
                    drops=["distances"]))  # fmt: skip
    labels: Labels = shards.folder.array("labels")
    return labels
