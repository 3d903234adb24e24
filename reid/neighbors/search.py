"""Nearest neighbours: the exact ones, and approximate ones."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.neighbors.candidates import Candidates
from reid.neighbors.exact import BLOCK_SIZE, MARGIN, SearchTask, neighbors_of
from reid.neighbors.inverted import inverted_neighbors
from reid.neighbors.kernels import (
    Floats,
    Indices,
    as_rows,
    half_squared_norms,
    search_exactly,
)
from reid.neighbors.processes import search_together
from reid.neighbors.rescoring import rescore
from reid.structures import ProgressBar

Search = Literal["exact", "ivf", "hnsw"]
_FAISS_ROWS = 16384


def nearest_neighbors(
    features: Tensor,
    k: int,
    *,
    block_size: int = BLOCK_SIZE,
    half_precision: bool | None = None,
    dims: int | None = None,
    progress: ProgressBar | None = None,
) -> Indices:
    """Exact nearest neighbours of N vectors among themselves, by Euclidean distance.

    Args:
        features: (N, D), finite; need not be of unit length. On a CUDA device, the
            device finds candidates and the CPU scores them again: the result is the same.
        k: Length of the lists, the vector itself included; at most N.
        block_size: Rows in a block of scores; does not change the result.
        half_precision: Search candidates in bfloat16. None: if the device has instructions for it.
            Does not change the result.
        dims: Dimensions in which candidates are searched, by products that bound those of the
            vectors; 0 or D: all of them. None: as many as pay, which a sample of the vectors
            tells. Does not change the result. A CUDA device always uses all.
        progress: Called with (images' worth of pairs done, N).

    Returns:
        (N, k) int32, nearest first. The vector itself is in first place; equal distances are
        ordered by index.

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    rows = as_rows(features)
    count = len(rows)
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to the number of vectors, {count}, got {k}")
    if block_size < 1:
        raise ValueError(f"block_size: expected 1 or more, got {block_size}")
    dim = rows.shape[1]
    if dims is not None and not 0 <= dims <= dim:
        raise ValueError(f"dims: expected 0 to the length of the vectors, {dim}, got {dims}")
    task = SearchTask(rows, k, block_size, half_precision, features.device.type, dims)
    if distributed.others_wait():
        return search_together(task, progress)
    return neighbors_of(task, 0, count, progress)


def farthest_distances(
    features: Tensor, *, block_size: int = BLOCK_SIZE, progress: ProgressBar | None = None
) -> Floats:
    """Each vector's largest squared Euclidean distance to any other (N,), in single precision.

    Args:
        features: (N, D), finite; the work is done on their device.
        block_size: Rows in a block of distances.
        progress: Called with (images' worth of pairs done, N).

    Raises:
        ValueError: A feature is not finite.
    """
    rows = as_rows(features)
    norms = (2 * half_squared_norms(rows)).astype(np.float32)
    tensor = features.detach().float()
    squares = torch.from_numpy(norms).to(tensor.device)
    largest = torch.zeros_like(squares)
    for start in range(0, len(rows), block_size):
        one = slice(start, start + block_size)
        for other_start in range(start, len(rows), block_size):
            other = slice(other_start, other_start + block_size)
            block = torch.addmm(squares[other], tensor[one], tensor[other].T, alpha=-2)
            block += squares[one, None]
            largest[one] = torch.maximum(largest[one], block.amax(1))
            largest[other] = torch.maximum(largest[other], block.amax(0))
        if progress is not None:
            left = max(len(rows) - one.stop, 0)
            progress(len(rows) - left * left // len(rows), len(rows))
    found: Floats = largest.cpu().numpy()
    return found


def approximate_neighbors(
    features: Tensor, k: int, search: Search, *, progress: ProgressBar | None = None
) -> Indices:
    """Approximate nearest neighbours, for more vectors than the exact search can take.

    The work is done on the CPU. Missed neighbours cost clusters: at 130,000 points a search with a
    recall of 0.74 left an adjusted Rand index of 0.44.

    Args:
        features: (N, D), finite.
        k: Length of the lists, the vector itself included; at most N.
        search: `ivf`: an inverted file of 2 sqrt(N) lists, of which a row visits as many as hold
            99.8 % of the neighbours of a sample. `hnsw`: a navigable small world graph of FAISS
            with 32 links (Malkov & Yashunin 2018; Johnson et al. 2019).
        progress: Called with (images' worth of work done, N).

    Returns:
        (N, k) int32, in the order of `nearest_neighbors`.

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    rows = as_rows(features)
    count = len(rows)
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to the number of vectors, {count}, got {k}")
    if search == "ivf":
        return inverted_neighbors(rows, k, progress)
    if search != "hnsw":
        raise ValueError(f"search: expected exact, ivf or hnsw, got {search!r}")
    return _graph_neighbors(rows, k, progress)


def _graph_neighbors(rows: Floats, k: int, progress: ProgressBar | None) -> Indices:
    import faiss  # here: the exact search does not need these 18 MB

    count, dim = rows.shape
    index: Any = faiss.IndexHNSWFlat(dim, 32)
    index.hnsw.efConstruction, index.hnsw.efSearch = 100, max(100, 2 * k)
    found = np.empty((count, min(k + MARGIN, count)), np.int64)
    for start in range(0, count, _FAISS_ROWS):
        index.add(rows[start : start + _FAISS_ROWS])
        if progress is not None:
            progress(min(start + _FAISS_ROWS, count) // 2, count)
    for start in range(0, count, _FAISS_ROWS):
        stop = min(start + _FAISS_ROWS, count)
        found[start:stop] = index.search(rows[start:stop], found.shape[1])[1]
        if progress is not None:
            progress((count + stop) // 2, count)
    everyone = np.arange(count, dtype=np.int32)
    without_itself = ~(found == everyone[:, None]).any(1)
    found[without_itself, -1] = everyone[without_itself]
    half_norms = half_squared_norms(rows)
    candidates = Candidates.empty(found.shape[1], count, np.zeros(count, np.float32), 0.0, k)
    candidates.index[:], candidates.filled[:] = found, found.shape[1]
    candidates.scores[:] = np.inf  # every candidate is scored again
    neighbors, _ = rescore(rows, half_norms, everyone, candidates, 0.0, 1.0)
    too_few = (found < 0).any(1)
    neighbors[too_few] = search_exactly(rows, half_norms, everyone[too_few], k)
    return neighbors
