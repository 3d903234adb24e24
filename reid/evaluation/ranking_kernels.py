"""Compiled loops of the ranking, and the types of its arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, prange

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float32]
JUNK = -1


@njit(cache=True)
def _num_before(
    values: Distances, indices: IntArray, padded: int, distance: np.float32, index: int
) -> int:
    """How many of the sorted (value, index) lie before (distance, index).

    `values` is filled up with infinity to `padded` - 1 entries, a power of two less one, so that
    the search has no branches.
    """
    position = 0
    step = padded >> 1
    while step:
        if values[position + step - 1] < distance:
            position += step
        step >>= 1
    if position < len(indices) and values[position] == distance:
        end = len(indices)
        while position < end:
            middle = (position + end) >> 1
            if values[middle] == distance and indices[middle] < index:
                position = middle + 1
            else:
                end = middle
    return position


@njit(parallel=True, cache=True)
def rank_rows(
    start: int,
    stop: int,
    distances: Distances,
    query_camids: IntArray,
    gallery_camids: IntArray,
    by_pid: IntArray,
    starts: IntArray,
    ends: IntArray,
    junk: IntArray,
    trapezoid: bool,
    average_precision: FloatArray,
    inverse_negative_penalty: FloatArray,
    first_match_rank: IntArray,
) -> None:
    """Fills in the last three for the queries from start to stop of a block of distances."""
    num_gallery = len(gallery_camids)
    for row in prange(start, stop):
        distance = distances[row]
        camid = query_camids[row]
        group = by_pid[starts[row] : ends[row]]
        hits = np.empty(len(group), np.int64)
        num_hits = 0
        for index in group:
            if camid < 0 or gallery_camids[index] != camid:
                hits[num_hits] = index
                num_hits += 1
        if num_hits == 0:
            continue
        hits = hits[:num_hits]
        # The group is in the order of the gallery, so a stable sort keeps it among equals.
        hits = hits[np.argsort(distance[hits], kind="mergesort")]
        padded = 1
        while padded <= num_hits:
            padded <<= 1
        values = np.full(padded, np.inf, np.float32)
        for i in range(num_hits):
            values[i] = distance[hits[i]]

        # counts[i]: images between hit i - 1 and hit i.
        counts = np.zeros(num_hits + 1, np.int64)
        last = values[num_hits - 1]
        for index in range(num_gallery):
            if distance[index] <= last:
                counts[_num_before(values, hits, padded, distance[index], index)] += 1
        # All of the identity and all junk was counted: hits here, the rest is removed.
        for index in group:
            if distance[index] <= last:
                counts[_num_before(values, hits, padded, distance[index], index)] -= 1
        for index in junk:
            if distance[index] <= last:
                counts[_num_before(values, hits, padded, distance[index], index)] -= 1

        total = 0.0
        wrong = 0
        for i in range(num_hits):
            wrong += counts[i]
            before = wrong + i
            precision = (i + 1) / (before + 1)
            if trapezoid:
                previous = i / before if before else 1.0
                precision = (previous + precision) / 2
            total += precision
        average_precision[row] = total / num_hits
        inverse_negative_penalty[row] = num_hits / (wrong + num_hits)
        first_match_rank[row] = counts[0]


@njit(parallel=True, cache=True)
def count_pairs(
    start: int,
    stop: int,
    distances: Distances,
    squares: Distances,
    query_pids: IntArray,
    query_camids: IntArray,
    gallery_pids: IntArray,
    gallery_camids: IntArray,
    scale: float,
    matching: IntArray,
    others: IntArray,
) -> None:
    """Adds the pairs of some rows of a block to the histograms of matching and other pairs."""
    workers = len(matching)
    for worker in prange(workers):
        for row in range(start + worker, stop, workers):
            pid, camid = query_pids[row], query_camids[row]
            for index in range(len(gallery_pids)):
                if gallery_pids[index] == JUNK:
                    continue
                same = gallery_pids[index] == pid and pid != JUNK
                if same and camid >= 0 and gallery_camids[index] == camid:
                    continue
                place = int(max(distances[row, index] + squares[row], 0.0) * scale)
                place = min(place, matching.shape[1] - 1)
                if same:
                    matching[worker, place] += 1
                else:
                    others[worker, place] += 1
