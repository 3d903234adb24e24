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

PADDING = 64
"""Sizes of products are rounded up to this, where sizes are many."""


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
        rows = -(-self.height // PADDING) * PADDING
        self._products = torch.empty(rows * self.height, dtype=self._kind)
        self._marks = np.empty(self.height * chunks_of(self.width), np.uint8)
        self._nothing = np.full(self.width, np.inf, np.float32)

    def first(self, one: Tensor, right: int, stop: int, places: Indices) -> int:
        """Takes the first candidates of rows that have none from a block at `right`.

        Args:
            one: (h, width) rows, with as many behind them as one likes.
            right: First of the other rows.
            stop: Behind the last that may be taken.
            places: (n,) where their candidates are.

        Returns:
            Behind the last row that was taken.
        """
        stop = min(right + self.height, stop)
        products = self._multiply(one, right, self._padded(right, stop, self.height))
        take_first(products, self._norms[right:stop], places, right, *self._found.arrays)
        return stop

    def offer(self, one: Tensor, norms: Floats, right: int, stop: int, places: Indices) -> None:
        """Offers the rows from `right` to `stop` to others.

        Args:
            one: (h, width) the others, with as many behind them as one likes.
            norms: (n,) half their squared lengths.
            right: First row that is offered.
            stop: Behind the last one.
            places: (n,) where the candidates of the others are.
        """
        for start in range(right, stop, self.width):
            end = min(start + self.width, stop)
            tile = self._multiply(one, start, self._padded(start, end, self.width))
            self._offer(tile, norms, start, end, places, self._nothing[: end - start])

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
        own = following(places[0], end - left)
        for start in range(right, stop, self.width):
            last = min(start + self.width, stop)
            place = places[1] + start - right
            limits = self._found.lost[place : place + last - start].copy()
            tile = self._multiply(one, start, last)
            marks = self._offer(tile, norms, start, last, own, limits)
            offer_to_columns(tile, norms, left, place, marks, *self._found.arrays)

    def rows(self, left: int, end: int) -> Tensor:
        """Some rows, in the type of the products."""
        return self._tensor[left:end].to(self._kind)

    def _offer(
        self, tile: Tile, norms: Floats, right: int, stop: int, places: Indices, limits: Floats
    ) -> Bytes:
        shape = len(places), chunks_of(stop - right)
        marks = self._marks[: shape[0] * shape[1]].reshape(shape)
        offer_to_rows(
            tile, norms, self._norms[right:stop], limits, places, right, marks, *self._found.arrays
        )
        return marks

    def _padded(self, right: int, stop: int, most: int) -> int:
        """Behind the last row of a product of one of few widths; a new one takes milliseconds."""
        wide = right + min(-(-(stop - right) // PADDING) * PADDING, most)
        return wide if wide <= len(self._tensor) else stop

    def _multiply(self, one: Tensor, right: int, stop: int) -> Tile:
        shape = len(one), stop - right
        products = self._products[: shape[0] * shape[1]].view(shape)
        torch.mm(one, self.rows(right, stop).T, out=products)
        return tile_of(products)


def following(place: int, count: int) -> Indices:
    """The numbers (count,) from `place` on."""
    return np.arange(place, place + count, dtype=np.int32)


def padded_rows(tensor: Tensor, places: Indices) -> Tensor:
    """The rows at some places, and copies of the last one up to a multiple of `PADDING`."""
    padded = np.pad(places, (0, -len(places) % PADDING), "edge")
    return tensor.index_select(0, torch.from_numpy(padded))


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
        tiles.first(tensor[left:end], left, count, following(left - first, end - left))
    for left, end in blocks:
        one, norms = tensor[left:end], half_norms[left:end]
        done = min(left + tiles.height, count)
        own = following(left - first, end - left)
        tiles.offer(one, norms, 0, first, own)
        tiles.offer_to_all(left, end, end, last, (left - first, end - first))
        tiles.offer(one, norms, max(last, done), count, own)
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
        places = following(left, len(part))
        done = tiles.first(one, 0, len(tensor), places)
        tiles.offer(one, norms, done, len(tensor), places)
