"""Products of rows in tiles that fit into a cache, and the order in which rows meet."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.candidates import (
    Candidates,
    Tile,
    chunks_of,
    offer_to_columns,
    offer_to_rows,
    take_first,
    tile_of,
)
from reid.neighbors.kernels import Bytes, Floats, Indices
from reid.structures import ProgressBar


class Tiles:
    """Products of blocks of rows, offered to candidates tile by tile, while these are cached.

    Args:
        tensor: (N, width) rows that are multiplied.
        half_norms: (N,).
        block_size: Most rows of a block.
        found: The candidates that are filled.
        kind: The type of the products; rows of another type are converted tile by tile. None: that
            of the rows.

    Attributes:
        height: Most rows of a block.
        width: Columns of a tile.
    """

    def __init__(
        self,
        tensor: Tensor,
        half_norms: Floats,
        block_size: int,
        found: Candidates,
        kind: torch.dtype | None = None,
    ) -> None:
        self._tensor, self._norms, self._found = tensor, half_norms, found
        self._kind = kind or tensor.dtype
        self.height = min(block_size, len(tensor))
        # A quarter of the rows, so that a tile of a usual block takes 2 MB
        self.width = max(1, self.height // 4)
        self._products = torch.empty(self.height**2, dtype=self._kind)
        self._marks = np.empty(self.height * chunks_of(self.width), np.uint8)
        self._nothing = np.full(self.width, np.inf, np.float32)

    def first(self, one: Tensor, right: int, place: int) -> int:
        """Takes the first candidates of `one`, which begin at `place`, from the rows at `right`."""
        stop = min(right + self.height, len(self._tensor))
        take_first(
            self._multiply(one, right, stop), self._norms[right:stop], place, right,
            *self._found.arrays,
        )  # fmt: skip
        return stop

    def offer(self, one: Tensor, norms: Floats, right: int, stop: int, place: int) -> None:
        """Offers the rows from `right` to `stop` to `one`, whose candidates begin at `place`."""
        for start in range(right, stop, self.width):
            end = min(start + self.width, stop)
            self._offer(one, norms, start, end, place, self._nothing[: end - start])

    def offer_to_all(
        self, left: int, end: int, right: int, stop: int, places: tuple[int, int]
    ) -> None:
        """Offers the rows left:end and right:stop to each other.

        Args:
            left: First of the one rows.
            end: Behind the last of them.
            right: First of the other rows.
            stop: Behind the last of them.
            places: Where their candidates begin.
        """
        one, norms = self.rows(left, end), self._norms[left:end]
        for start in range(right, stop, self.width):
            last = min(start + self.width, stop)
            place = places[1] + start - right
            limits = self._found.lost[place : place + last - start].copy()
            tile, marks = self._offer(one, norms, start, last, places[0], limits)
            offer_to_columns(tile, norms, left, place, marks, *self._found.arrays)

    def rows(self, left: int, end: int) -> Tensor:
        """Some rows, in the type of the products."""
        return self._tensor[left:end].to(self._kind)

    def _offer(
        self, one: Tensor, norms: Floats, right: int, stop: int, place: int, limits: Floats
    ) -> tuple[Tile, Bytes]:
        tile = self._multiply(one, right, stop)
        shape = len(one), chunks_of(stop - right)
        marks = self._marks[: shape[0] * shape[1]].reshape(shape)
        offer_to_rows(
            tile, norms, self._norms[right:stop], limits, place, right, marks, *self._found.arrays
        )
        return tile, marks

    def _multiply(self, one: Tensor, right: int, stop: int) -> Tile:
        shape = len(one), stop - right
        products = self._products[: shape[0] * shape[1]].view(shape)
        torch.mm(one, self.rows(right, stop).T, out=products)
        return tile_of(products)


def search_rows(
    tensor: Tensor,
    half_norms: Floats,
    first: int,
    block_size: int,
    found: Candidates,
    progress: ProgressBar | None,
) -> None:
    """Fills `found`: candidates of its rows, which start at row `first`, among all rows.

    Each pair of blocks of these rows is multiplied only once.
    """
    count, last = len(tensor), first + len(found.scores)
    tiles = Tiles(tensor, half_norms, block_size, found)
    blocks = [(left, min(left + block_size, last)) for left in range(first, last, block_size)]
    pairs = 0
    for left, end in blocks:
        tiles.first(tensor[left:end], left, left - first)
    for left, end in blocks:
        one, norms = tensor[left:end], half_norms[left:end]
        done = min(left + tiles.height, count)
        tiles.offer(one, norms, 0, first, left - first)
        tiles.offer_to_all(left, end, end, last, (left - first, end - first))
        tiles.offer(one, norms, max(last, done), count, left - first)
        pairs += len(one) * (first + (end - left) + 2 * (last - end) + count - last)
        if progress is not None:
            progress(pairs // (last - first), count)


def search_between(
    tensor: Tensor,
    half_norms: Floats,
    one: tuple[int, int],
    other: tuple[int, int],
    block_size: int,
    found: Candidates,
) -> None:
    """Offers two blocks of rows to each other; each pair of rows is multiplied once.

    Args:
        tensor: (N, width) rows that are multiplied.
        half_norms: (N,).
        one: First row of a block, and behind its last.
        other: The same of the other block.
        block_size: Most rows of a product.
        found: Candidates of the rows of `one`, then of those of `other`.
    """
    tiles = Tiles(tensor, half_norms, block_size, found)
    size = one[1] - one[0]
    for left in range(*one, tiles.height):
        end = min(left + tiles.height, one[1])
        tiles.offer_to_all(left, end, *other, (left - one[0], size))


def search_some(
    tensor: Tensor,
    half_norms: Floats,
    which: Indices,
    block_size: int,
    found: Candidates,
    kind: torch.dtype | None = None,
) -> None:
    """Finds candidates of some rows among all; `kind` is that of the products, as in `Tiles`."""
    tiles = Tiles(tensor, half_norms, block_size, found, kind)
    for left in range(0, len(which), block_size):
        part = which[left : left + block_size]
        one = tensor[torch.from_numpy(part.astype(np.int64))].to(kind or tensor.dtype)
        norms = half_norms[part]
        done = tiles.first(one, 0, left)
        tiles.offer(one, norms, done, len(tensor), left)
