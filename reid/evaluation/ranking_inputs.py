"""What the ranking functions take: checked identities and cameras, and blocks of distances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reid.evaluation.ranking_kernels import JUNK, Distances, IntArray
from reid.neighbors import all_finite

_TILE_ROWS = 128
_TILE_COLUMNS = 2048
_BLOCK_BYTES = 64 * 2**20
_TILE_BYTES = 64 * 2**20  # of the features of a tile: lower tiles above 8,192 dimensions


@dataclass(frozen=True)
class RankingIds:
    """Identities and cameras, with the gallery grouped by identity.

    Attributes:
        by_pid: (G,) gallery indices ordered by (identity, index).
        start: (Q,) where the query's identity starts in `by_pid`.
        end: (Q,) where it ends; equal to start for queries of identity -1.
        junk: Gallery indices of junk.
    """

    query_pids: IntArray
    gallery_pids: IntArray
    query_camids: IntArray
    gallery_camids: IntArray
    by_pid: IntArray
    start: IntArray
    end: IntArray
    junk: IntArray

    @classmethod
    def of(
        cls, query_pids: Tensor, gallery_pids: Tensor, query_camids: Tensor, gallery_camids: Tensor
    ) -> RankingIds:
        """Checks and groups (Q,), (G,), (Q,), (G,) int64 ids.

        Raises:
            ValueError: One has a wrong shape, type or length, or is below -1.
        """
        q_pids = _id_array("query_pids", query_pids)
        g_pids = _id_array("gallery_pids", gallery_pids)
        q_camids = _id_array("query_camids", query_camids)
        g_camids = _id_array("gallery_camids", gallery_camids)
        _check_length("query_camids", len(q_camids), len(q_pids))
        _check_length("gallery_camids", len(g_camids), len(g_pids))
        return cls.of_arrays(q_pids, g_pids, q_camids, g_camids)

    @classmethod
    def of_arrays(
        cls, q_pids: IntArray, g_pids: IntArray, q_camids: IntArray, g_camids: IntArray
    ) -> RankingIds:
        """Groups ids that were checked."""
        by_pid = np.argsort(g_pids, kind="stable")
        start = np.searchsorted(g_pids, q_pids, side="left", sorter=by_pid)
        end = np.searchsorted(g_pids, q_pids, side="right", sorter=by_pid)
        end[q_pids == JUNK] = start[q_pids == JUNK]
        junk = np.flatnonzero(g_pids == JUNK)
        return cls(q_pids, g_pids, q_camids, g_camids, by_pid, start, end, junk)

    def check_features(self, query_feat: Tensor, gallery_feat: Tensor) -> None:
        """Checks the features that belong to these identities and cameras.

        Raises:
            ValueError: They have a wrong shape or length, are not finite, or too large.
        """
        check_features(query_feat, gallery_feat)
        _check_length("query_pids", len(self.query_pids), len(query_feat))
        _check_length("gallery_pids", len(self.gallery_pids), len(gallery_feat))


def _id_array(name: str, ids: Tensor) -> IntArray:
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected one dimension of int64, got {ids.dtype} {tuple(ids.shape)}"
        )
    if len(ids) and int(ids.min()) < -1:
        raise ValueError(f"{name}: expected -1 or more, got {int(ids.min())}")
    array: IntArray = np.ascontiguousarray(ids.detach().cpu().numpy())
    return array


def _check_length(name: str, length: int, expected: int) -> None:
    if length != expected:
        raise ValueError(f"{name}: expected {expected} entries, got {length}")


def check_features(query_feat: Tensor, gallery_feat: Tensor) -> None:
    """Checks (Q, D) and (G, D) features of one device.

    Raises:
        ValueError: They have a wrong shape or type, are not finite, or too large.
    """
    for name, feat in (("query_feat", query_feat), ("gallery_feat", gallery_feat)):
        if feat.ndim != 2 or not feat.shape[1] or not feat.is_floating_point():
            raise ValueError(
                f"{name}: expected (N, D) floating point with D > 0, got {feat.dtype} "
                f"{tuple(feat.shape)}"
            )
        # In blocks: a mask of all of it would cost a quarter of the features' memory.
        height = _tile_height(_TILE_COLUMNS, feat.shape[1])
        for start in range(0, len(feat), height):
            part = feat[start : start + height]
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"{name}: expected finite features, got NaN or infinity")
            # A squared distance is at most four times the larger squared norm.
            if bool((part.float().square().sum(1) > torch.finfo(torch.float32).max / 8).any()):
                raise ValueError(f"{name}: expected features whose distances fit into float32")
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


def checked_blocks(
    blocks: Iterable[tuple[int, npt.NDArray[np.floating]]], ids: RankingIds
) -> Iterator[tuple[int, Distances]]:
    """Given blocks as float32, each query once.

    Raises:
        ValueError: A block has a wrong shape or is not finite, or queries are missing or doubled.
    """
    num_queries, num_gallery = len(ids.query_pids), len(ids.gallery_pids)
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


def distance_blocks(
    query_feat: Tensor, gallery_feat: Tensor, block_size: int
) -> Iterator[tuple[int, Distances]]:
    """Distances up to a constant per query, (b, G padded to whole tiles).

    What lies behind the G-th column is padding. The next block overwrites the last one.
    """
    num_queries, dim = query_feat.shape
    num_gallery = len(gallery_feat)
    tile_rows, tile_columns = (_tile_height(most, dim) for most in (_TILE_ROWS, _TILE_COLUMNS))
    num_tiles = -(-num_gallery // tile_columns)
    width = num_tiles * tile_columns
    wanted = block_size or _BLOCK_BYTES // (4 * max(width, 1)) // tile_rows * tile_rows
    rows = max(1, -(-min(wanted, num_queries) // tile_rows)) * tile_rows
    device = query_feat.device
    buffer = torch.empty(rows, width, dtype=torch.float32, device=device)
    tail = torch.zeros(tile_columns, dim, dtype=torch.float32, device=device)
    if num_tiles:
        last = gallery_feat[(num_tiles - 1) * tile_columns :]
        tail[: len(last)] = last

    def tile_of(index: int) -> Tensor:
        if index == num_tiles - 1:
            return tail
        return gallery_feat[index * tile_columns : (index + 1) * tile_columns].float()

    # |q - g|^2 = |q|^2 + |g|^2 - 2qg, where |q|^2 does not matter.
    norms = torch.cat(
        [tile_of(i).double().square().sum(1).float() for i in range(num_tiles)]
        or [torch.empty(0, device=device)]
    )
    for start in range(0, num_queries, rows):
        used = min(rows, num_queries - start)
        tiles = [
            _whole_tile(query_feat[start + top : start + min(top + tile_rows, used)], tile_rows)
            for top in range(0, used, tile_rows)
        ]
        for index in range(num_tiles):
            columns = slice(index * tile_columns, (index + 1) * tile_columns)
            gallery = tile_of(index).T
            for place, queries in enumerate(tiles):
                tile = slice(place * tile_rows, (place + 1) * tile_rows)
                torch.addmm(norms[columns], queries, gallery, alpha=-2.0, out=buffer[tile, columns])
        yield start, buffer[:used].cpu().numpy()


def _tile_height(most: int, dim: int) -> int:
    """Rows of a tile of features: `most`, or the power of two below it that `_TILE_BYTES` hold.

    It depends on nothing but the dimensions, so that block sizes do not change a result.
    """
    while most > 1 and 4 * most * dim > _TILE_BYTES:
        most //= 2
    return most


def _whole_tile(features: Tensor, height: int) -> Tensor:
    """Features (n, D) in float32, with zeros up to `height`."""
    missing = height - len(features)
    if not missing:
        return features.float()
    return torch.cat([features.float(), features.new_zeros(missing, features.shape[1]).float()])
