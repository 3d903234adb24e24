"""Distances of queries to a gallery, in blocks of queries.

The distances do not depend on the size of the blocks. The last bits of a matrix product change with
its shape, so all products are tiles of one shape, which depends only on the features' dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reid.evaluation.ranking_kernels import Distances
from reid.neighbors import all_finite

_TILE_ROWS = 128
_TILE_COLUMNS = 2048
_TILE_BYTES = 128 * 2**20  # of features: 2048 rows of 16,384 dimensions
_BLOCK_BYTES = 64 * 2**20  # of distances
_FAR_FROM_ONE = 2.0**40


def comparable_features(query_feat: Tensor, gallery_feat: Tensor) -> tuple[Tensor, Tensor]:
    """Features (Q, D) and (G, D), checked and scaled so that float32 can hold their distances.

    If the features' scale is far from 1, all are multiplied by one power of two. Squares then stay
    above 0 and below infinity, and no digit changes.

    Raises:
        ValueError: Features have a wrong shape or type, or are not finite.
    """
    largest = max(_largest("query_feat", query_feat), _largest("gallery_feat", gallery_feat))
    if query_feat.shape[1] != gallery_feat.shape[1]:
        raise ValueError(
            f"gallery_feat: expected (G, {query_feat.shape[1]}) as query_feat has, "
            f"got {tuple(gallery_feat.shape)}"
        )
    if query_feat.device != gallery_feat.device:
        raise ValueError(
            f"gallery_feat: expected on {query_feat.device} as query_feat is, "
            f"got {gallery_feat.device}"
        )
    if not largest or 1 / _FAR_FROM_ONE < largest < _FAR_FROM_ONE:
        return query_feat, gallery_feat
    exponent = -math.frexp(largest)[1]
    # In two steps: for the smallest numbers, one factor would be too large for float32.
    factors = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    query_feat, gallery_feat = (
        feat.float() * factors[0] * factors[1] for feat in (query_feat, gallery_feat)
    )
    return query_feat, gallery_feat


def _largest(name: str, feat: Tensor) -> float:
    """The largest absolute value of (N, D) features; 0 if there are none."""
    if feat.ndim != 2 or not feat.shape[1] or not feat.is_floating_point():
        raise ValueError(
            f"{name}: expected (N, D) floating point with D > 0, got {feat.dtype} "
            f"{tuple(feat.shape)}"
        )
    largest = 0.0
    rows = tile_columns(feat.shape[1])
    for start in range(0, len(feat), rows):  # in pieces: a mask of all features would be large
        value = float(feat[start : start + rows].float().abs().amax())
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected finite features, got NaN or infinity")
        largest = max(largest, value)
    return largest


def tile_columns(dim: int) -> int:
    """Gallery images in a tile: 2048, or fewer if features have very many dimensions."""
    return max(1, min(_TILE_COLUMNS, _TILE_BYTES // (4 * dim)))


def squared_norms(feat: Tensor) -> Distances:
    """(N,) squared norms of (N, D) features."""
    rows = tile_columns(feat.shape[1])
    starts = range(0, len(feat), rows)
    parts = [feat[start : start + rows].float().square().sum(1) for start in starts]
    norms: Distances = torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.float32)
    return norms


def checked_blocks(
    blocks: Iterable[tuple[int, npt.NDArray[np.floating]]], num_queries: int, num_gallery: int
) -> Iterator[tuple[int, Distances]]:
    """The given blocks as float32; checks that they hold each query once.

    Args:
        blocks: (start, distances (b, G)): the distances of the queries from `start` on. Together
            the blocks hold each query once, in any order.
        num_queries: Q.
        num_gallery: G.

    Raises:
        ValueError: A block has a wrong shape or is not finite, or queries are missing or repeated.
    """
    seen = np.zeros(num_queries, dtype=bool)
    for start, distances in blocks:
        if distances.ndim != 2 or distances.shape[1] != num_gallery:
            raise ValueError(f"blocks: expected (b, {num_gallery}), got {distances.shape}")
        rows = slice(start, start + len(distances))
        if start < 0 or rows.stop > num_queries or seen[rows].any():
            raise ValueError(
                f"blocks: expected each of {num_queries} queries once, got rows {start} to "
                f"{rows.stop} of them"
            )
        seen[rows] = True
        block: Distances = np.ascontiguousarray(distances, dtype=np.float32)
        if not all_finite(block):
            raise ValueError("blocks: expected finite distances, got NaN or infinity")
        yield start, block
    if not seen.all():
        raise ValueError(f"blocks: expected {num_queries} queries, got {int(seen.sum())}")


def distance_blocks(query_feat: Tensor, gallery_feat: Tensor) -> Iterator[tuple[int, Distances]]:
    """Squared Euclidean distances without the query's squared norm, in float32.

    Args:
        query_feat: (Q, D) features.
        gallery_feat: (G, D) features, on the same device.

    Yields:
        (start, distances (b, G padded to whole tiles)): the distances of the queries from `start`
        on. Columns from G on are padding. Each block overwrites the one before.
    """
    num_queries, dim = query_feat.shape
    num_gallery, tile_width = len(gallery_feat), tile_columns(dim)
    tile_height = max(1, min(_TILE_ROWS, _TILE_BYTES // (4 * dim)))
    num_tiles = -(-num_gallery // tile_width)
    width = num_tiles * tile_width
    wanted = _BLOCK_BYTES // (4 * max(width, 1)) // tile_height * tile_height
    wanted = min(wanted, _TILE_BYTES // (4 * dim))
    rows = max(1, -(-min(wanted, num_queries) // tile_height)) * tile_height
    device = query_feat.device
    buffer = torch.empty(rows, width, dtype=torch.float32, device=device)
    tail = torch.zeros(tile_width, dim, dtype=torch.float32, device=device)
    if num_tiles:
        last = gallery_feat[(num_tiles - 1) * tile_width :]
        tail[: len(last)] = last

    def tile_of(index: int) -> Tensor:
        if index == num_tiles - 1:
            return tail
        return gallery_feat[index * tile_width : (index + 1) * tile_width].float()

    # |q - g|^2 = |q|^2 + |g|^2 - 2qg, and |q|^2 does not change a query's ranking.
    norms = torch.cat(
        [tile_of(i).double().square().sum(1).float() for i in range(num_tiles)]
        or [torch.empty(0, device=device)]
    )
    for start in range(0, num_queries, rows):
        queries = query_feat[start : start + rows].float()
        used = len(queries)
        padding = -used % tile_height
        if padding:
            queries = torch.cat([queries, queries.new_zeros(padding, dim)])
        for index in range(num_tiles):
            columns = slice(index * tile_width, (index + 1) * tile_width)
            gallery = tile_of(index).T
            for top in range(0, len(queries), tile_height):
                tile = slice(top, top + tile_height)
                torch.addmm(
                    norms[columns], queries[tile], gallery, alpha=-2.0, out=buffer[tile, columns]
                )
        yield start, buffer[:used].cpu().numpy()
