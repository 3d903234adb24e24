"""The sparse k-reciprocal Jaccard distance in blocks, on arrays that are mapped into memory.

The compiled loops are those of `reid.neighbors.jaccard`: they work on a range of rows of arrays, be
these in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numba
import numpy as np

from reid.neighbors.jaccard import distances_of_rows
from reid.neighbors.jaccard_kernels import (
    average_rows,
    count_columns,
    count_in_columns,
    count_members,
    find_reciprocal,
    list_members,
    soft_weights,
    take_by_column,
)
from reid.neighbors.kernels import Floats, Indices, Offsets, run_in_pieces
from reid.neighbors.shards.folder import Facts
from reid.neighbors.shards.search import ListLengths
from reid.neighbors.shards.steps import ROWS, Shapes, Shards, Step, blocks_of, run_rows
from reid.neighbors.sparse import Rows

_RECIPROCAL = ("full_sizes", "full_members", "half_sizes", "half_members")
_Work = Callable[[int, int], Facts | None]


class ShardedJaccard:
    """Distances of all rows from the lists of `ShardedSearch`, left in pieces of the folder.

    Args:
        shards: The processes.
        rows: (N, D) float32, mapped into memory, contiguous.
        lengths: Of the lists.
        max_distance: Larger distances are left out.
        block_rows: Most rows of a block.
        column_blocks: In how many blocks the columns are sorted; each reads all entries.
    """

    def __init__(
        self,
        shards: Shards,
        rows: Floats,
        lengths: ListLengths,
        max_distance: float,
        block_rows: int = ROWS,
        column_blocks: int = 1,
    ) -> None:
        self._shards, self._folder = shards, shards.folder
        self._rows, self._lengths = rows, lengths
        self._max_distance = max_distance
        self._count, self._dim = rows.shape
        self._block_rows, self._column_blocks = block_rows, column_blocks
        self._blocks = blocks_of(self._count, block_rows)
        self._weights = "mean" if lengths.nearest > 1 else "set"

    def run(self) -> None:
        """Does what is left; every process must call it.

        Raises:
            BlocksDone: See `Shards.run`.
        """
        lengths, count = self._lengths, self._count
        self._step("reciprocal", "Reciprocal neighbours", self._find_reciprocal, lambda: {
            "full_sizes": ((count,), np.int32), "half_sizes": ((count,), np.int32),
            "full_members": ((count, lengths.full), np.int32),
            "half_members": ((count, lengths.half), np.int32),
        }, drops=["lists", "half_lists"])  # fmt: skip
        self._sizes("set", "Sizes of expanded sets", self._count_members)
        self._step("sets", "Expanded sets", self._list_members, lambda: self._entries("set"),
                   drops=[*_RECIPROCAL, "half_norms"])  # fmt: skip
        if lengths.nearest > 1:
            self._sizes("mean", "Sizes of averaged rows", self._count_columns)
            self._step("means", "Averaged rows", self._average, lambda: self._entries("mean"),
                       drops=["nearest", *_parts("set")])  # fmt: skip
        blocks = self._column_blocks
        self._sizes("column", "Sizes of columns", self._count_in_columns, blocks)
        self._step("columns", "Columns", self._take_columns, lambda: self._entries("column"),
                   blocks)  # fmt: skip
        self._step("distances", "Jaccard distances", self._measure,
                   drops=[*_parts(self._weights), *_parts("column")])  # fmt: skip

    def pieces(self) -> Iterator[Rows]:
        """The distances, block by block; each block is read when it is asked for."""
        for block in range(self._blocks):
            first = self._count * block // self._blocks
            indptr, indices, data = self._folder.read_piece("distances", first)
            yield Rows(indptr, indices, data, (len(indptr) - 1, self._count))

    def _step(
        self,
        name: str,
        title: str,
        work: _Work,
        makes: Callable[[], Shapes] = dict,
        blocks: int | None = None,
        then: Callable[[], None] | None = None,
        drops: Sequence[str] = (),
    ) -> None:
        """Calls `work` with the edges of each block."""
        blocks = blocks or self._blocks

        def call(block: int) -> Facts | None:
            return work(self._count * block // blocks, self._count * (block + 1) // blocks)

        self._shards.run(Step(name, title, blocks, call, makes, then=then, drops=drops))

    def _sizes(
        self,
        name: str,
        title: str,
        work: _Work,
        blocks: int | None = None,
    ) -> None:
        """A step that counts entries, of which the places of a sparse matrix follow."""
        count, array = self._count, self._folder.array

        def begin() -> None:
            starts = array(f"{name}_starts")
            starts[0] = 0
            np.cumsum(array(f"{name}_counts"), out=starts[1:])

        shapes: Shapes = {f"{name}_counts": ((count,), np.int64),
                          f"{name}_starts": ((count + 1,), np.int64)}  # fmt: skip
        self._step(f"{name}_sizes", title, work, lambda: shapes, blocks, begin,
                   [f"{name}_counts"])  # fmt: skip

    def _entries(self, name: str) -> Shapes:
        """The arrays of the entries of a sparse matrix whose rows have been counted."""
        total = int(self._folder.array(f"{name}_starts")[-1])
        return {f"{name}_indices": ((total,), np.int32), f"{name}_data": ((total,), np.float32)}

    def _matrix(self, name: str) -> tuple[Offsets, Indices, Floats]:
        starts, indices, data = (self._folder.array(part) for part in _parts(name))
        return starts, indices, data

    def _find_reciprocal(self, first: int, last: int) -> None:
        for name, lists in (("full", "lists"), ("half", "half_lists")):
            near = self._folder.array(lists)
            run_rows(
                find_reciprocal, first, last, near.shape[1] ** 2,
                near, self._folder.array(f"{name}_sizes"), self._folder.array(f"{name}_members"),
            )  # fmt: skip

    @property
    def _reciprocal(self) -> tuple[Indices, ...]:
        return tuple(self._folder.array(name) for name in _RECIPROCAL)

    def _count_members(self, first: int, last: int) -> None:
        operations = self._lengths.full**2 * self._lengths.half
        run_rows(count_members, first, last, operations, *self._reciprocal,
                 self._folder.array("set_counts"))  # fmt: skip

    def _list_members(self, first: int, last: int) -> Facts:
        """The expanded sets, and the weights of their members."""
        starts, indices, data = self._matrix("set")
        operations = self._lengths.full**2 * self._lengths.half
        run_rows(list_members, first, last, operations, *self._reciprocal, starts, indices)
        scale = np.empty(last, np.float32)  # what is not written to takes no memory
        scale[first:last] = 1
        run_rows(
            soft_weights, first, last, self._dim * _entries_in_row(starts, first, last),
            self._rows, self._folder.array("half_norms"), starts, indices, scale, False, data,
        )  # fmt: skip
        return {"entries": int(starts[last] - starts[first])}

    def _count_columns(self, first: int, last: int) -> None:
        self._for_means(count_columns, first, last, self._folder.array("mean_counts"))

    def _average(self, first: int, last: int) -> Facts:
        starts, indices, data = self._matrix("mean")
        self._for_means(average_rows, first, last, starts, indices, data)
        return {"entries": int(starts[last] - starts[first])}

    def _for_means(
        self, kernel: Callable[..., None], first: int, last: int, *found: Offsets | Indices | Floats
    ) -> None:
        weights, nearest = self._matrix("set"), self._folder.array("nearest")
        operations = 2 * nearest.shape[1] ** 2 * _entries_in_row(weights[0], first, last)
        run_rows(kernel, first, last, operations, *weights, nearest, *found)

    def _count_in_columns(self, first: int, last: int) -> None:
        starts, indices, _ = self._matrix(self._weights)
        counts = self._folder.array("column_counts")[first:last]
        counts[:] = 0
        self._for_columns(count_in_columns, starts, indices, first, last, counts)

    def _take_columns(self, first: int, last: int) -> None:
        starts, indices, data = self._folder.array("column_starts"), *self._matrix("column")[1:]
        heads = starts[first:last].copy()
        self._for_columns(
            take_by_column, *self._matrix(self._weights), first, last, heads, indices, data
        )

    def _for_columns(
        self, kernel: Callable[..., None], starts: Offsets, *arguments: object
    ) -> None:
        """Reads all entries with one thread."""
        operations = 4 * _entries_in_row(starts, 0, self._count) * numba.get_num_threads()
        run_in_pieces(kernel, self._count, operations, starts, *arguments)

    def _measure(self, first: int, last: int) -> Facts:
        """The distances of a block."""
        starts, indices, data = self._matrix(self._weights)
        count = self._count
        some = Rows(starts[first : last + 1], indices, data, (last - first, count))
        columns = Rows(*self._matrix("column"), (count, count))
        found = distances_of_rows(some, columns, count, self._max_distance)
        self._folder.write_piece("distances", first, found.indptr, found.indices, found.data)
        return {"entries": len(found.data)}


def _parts(name: str) -> list[str]:
    """The arrays of a sparse matrix."""
    return [f"{name}_{part}" for part in ("starts", "indices", "data")]


def _entries_in_row(starts: Offsets, first: int, last: int) -> float:
    return float(starts[last] - starts[first]) / max(last - first, 1)
