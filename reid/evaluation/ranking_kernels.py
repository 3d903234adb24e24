"""Compiled loops of the ranking, the rule that says what is junk, and the types of the arrays.

The rule is in this file because numba recompiles a cached loop only if the loop's file changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float32]
JUNK = -1
"""The identity of junk: the same as that of unlabelled images."""
_NO_CAMERA = -1
_CHUNK = 4096  # distances, which stay in the nearest cache
# What a distance costs that is looked at, and one that is looked up, in comparisons with a hit.
_ROW_COST, _LOOK_UP_COST = 9, 500


@njit(cache=True)
def is_junk(pid: int, camid: int, other_pid: int, other_camid: int) -> bool:
    """Whether the protocol leaves a gallery image out for a query; the only place that decides.

    An image is junk if it has no identity, or if it has the query's identity and was taken by the
    query's camera, where this camera is known. (The query's image itself is junk too, but
    only its path shows that: see `Relevance.itself`.)

    Args:
        pid: Identity of the query.
        camid: Camera of the query, -1 = unknown.
        other_pid: Identity of the gallery image.
        other_camid: Camera of the gallery image.
    """
    return other_pid == JUNK or (other_pid == pid and other_camid == camid and camid != _NO_CAMERA)


@njit(cache=True)
def junk_mask(
    pid: int, camid: int, gallery_pids: IntArray, gallery_camids: IntArray, itself: IntArray
) -> BoolArray:
    """Whether each gallery image is junk for a query (G,); `itself`: images that are the query."""
    junk = np.empty(len(gallery_pids), np.bool_)
    for index in range(len(gallery_pids)):
        junk[index] = is_junk(pid, camid, gallery_pids[index], gallery_camids[index])
    for index in itself:
        junk[index] = True
    return junk


@njit(cache=True)
def _contains(indices: IntArray, index: int) -> bool:
    for other in indices:  # noqa: SIM110 - numba compiles no generator
        if other == index:
            return True
    return False


@njit(cache=True)
def _find_matches(
    pid: int, camid: int, gallery_camids: IntArray, group: IntArray, itself: IntArray
) -> IntArray:
    """The images of a query's identity (`group`) that are not junk, in the group's order."""
    matches = np.empty(len(group), np.int64)
    count = 0
    for index in group:
        if not is_junk(pid, camid, pid, gallery_camids[index]) and not _contains(itself, index):
            matches[count] = index
            count += 1
    return matches[:count]


@njit(cache=True)
def count_matches(
    query_pids: IntArray,
    query_camids: IntArray,
    gallery_camids: IntArray,
    by_pid: IntArray,
    starts: IntArray,
    ends: IntArray,
    itself_starts: IntArray,
    itself: IntArray,
) -> IntArray:
    """(Q,) matches of each query; the arguments are those of `Relevance`."""
    counts = np.empty(len(query_pids), np.int64)
    for row in range(len(query_pids)):
        group = by_pid[starts[row] : ends[row]]
        same_image = itself[itself_starts[row] : itself_starts[row + 1]]
        found = _find_matches(query_pids[row], query_camids[row], gallery_camids, group, same_image)
        counts[row] = len(found)
    return counts


@njit(cache=True)
def _num_nearer(values: Distances, padded: int, distance: np.float32) -> int:
    """How many of the sorted `values` are below `distance`.

    `values` is padded with infinity to `padded` - 1 entries (a power of two minus one), so the
    search needs no branches.
    """
    position = 0
    step = padded >> 1
    while step:
        if values[position + step - 1] < distance:
            position += step
        step >>= 1
    return position


@njit(cache=True)
def _count_up_to(distances: Distances, limit: np.float32) -> Any:
    """How many distances are at most `limit`, and how many of them equal it."""
    near, equal = np.uint32(0), np.uint32(0)  # a CPU adds 8 or 16 of these at a time
    for index in range(len(distances)):
        near = np.uint32(near + np.uint32(distances[index] <= limit))
        equal = np.uint32(equal + np.uint32(distances[index] == limit))
    return np.int64(near), np.int64(equal)


@njit(cache=True)
def _count_between(
    distance: Distances, values: Distances, padded: int, num_hits: int, counts: IntArray
) -> int:
    """Adds the images between hits to their counts; returns how many tie with a hit.

    Either each image near enough is looked up among the hits, or the whole row is compared with
    each hit: 16 images at a time, this is faster unless hits are many or lie far in front.
    """
    near = _count_up_to(distance, values[num_hits - 1])[0]
    tied = 0
    if num_hits * len(distance) > _ROW_COST * len(distance) + _LOOK_UP_COST * near:
        for value in distance:
            if value <= values[num_hits - 1]:
                place = _num_nearer(values, padded, value)
                counts[place] += 1
                tied += values[place] == value
        return tied
    for start in range(0, len(distance), _CHUNK):
        part = distance[start : start + _CHUNK]
        for i in range(num_hits):
            near, equal = _count_up_to(part, values[i])
            counts[i] += near
            if i == 0 or values[i - 1] < values[i]:
                tied += equal
    for i in range(num_hits - 1, 0, -1):
        counts[i] -= counts[i - 1]
    return tied


@njit(cache=True)
def _average_precision(counts: IntArray, num_hits: int, trapezoid: bool) -> tuple[float, int]:
    """The average precision, and how many wrong answers are nearer than the last hit."""
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
    return total / num_hits, wrong


@njit(cache=True)
def _take_back(
    distance: Distances,
    indices: IntArray,
    values: Distances,
    padded: int,
    last: np.float32,
    counts: IntArray,
) -> int:
    """Takes images out of the counts between hits; returns how many of them tie with a hit."""
    tied = 0
    for index in indices:
        value = distance[index]
        if value <= last:
            place = _num_nearer(values, padded, value)
            counts[place] -= 1
            tied += values[place] == value
    return tied


@njit(parallel=True, cache=True)
def rank_rows(
    start: int,
    stop: int,
    distances: Distances,
    query_pids: IntArray,
    query_camids: IntArray,
    gallery_pids: IntArray,
    gallery_camids: IntArray,
    by_pid: IntArray,
    starts: IntArray,
    ends: IntArray,
    junk: IntArray,
    itself_starts: IntArray,
    itself: IntArray,
    trapezoid: bool,
    average_precision: FloatArray,
    inverse_negative_penalty: FloatArray,
    first_match_rank: IntArray,
    ties: IntArray,
) -> None:
    """Fills in the last four for the queries from start to stop of a block of distances."""
    for row in prange(start, stop):
        distance = distances[row, : len(gallery_pids)]  # the columns behind are padding
        pid = query_pids[row]
        group = by_pid[starts[row] : ends[row]]
        same_image = itself[itself_starts[row] : itself_starts[row + 1]]
        hits = _find_matches(pid, query_camids[row], gallery_camids, group, same_image)
        num_hits = len(hits)
        if num_hits == 0:
            continue
        padded = 1
        while padded <= num_hits:
            padded <<= 1
        values = np.full(padded, np.inf, np.float32)
        for place, value in enumerate(np.sort(distance[hits])):
            values[place] = value

        # counts[i]: images farther than hit i - 1, and not farther than hit i.
        counts = np.zeros(num_hits + 1, np.int64)
        last = values[num_hits - 1]
        tied = _count_between(distance, values, padded, num_hits, counts)
        # The counts include hits, which are ranked below, and junk: take both out again.
        tied -= _take_back(distance, group, values, padded, last, counts)
        tied -= _take_back(distance, junk, values, padded, last, counts)
        for i in range(len(same_image)):
            other = gallery_pids[same_image[i]]
            if other != pid and other != JUNK:  # in neither of the two
                rest = same_image[i : i + 1]
                tied -= _take_back(distance, rest, values, padded, last, counts)

        average_precision[row], wrong = _average_precision(counts, num_hits, trapezoid)
        inverse_negative_penalty[row] = num_hits / (wrong + num_hits)
        first_match_rank[row] = counts[0]
        ties[row] = tied


@njit(cache=True)
def _bin_of(distance: np.float32, square: np.float32, scale: float, bins: int) -> int:
    return min(int(max(distance + square, 0.0) * scale), bins - 1)


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
    itself_starts: IntArray,
    itself: IntArray,
    scale: float,
    matching: IntArray,
    others: IntArray,
) -> None:
    """Adds the pairs of some rows of a block to the histograms of matching and other pairs."""
    workers, bins = matching.shape
    for worker in prange(workers):
        for row in range(start + worker, stop, workers):
            pid, camid = query_pids[row], query_camids[row]
            for index in range(len(gallery_pids)):
                other = gallery_pids[index]
                if is_junk(pid, camid, other, gallery_camids[index]):
                    continue
                place = _bin_of(distances[row, index], squares[row], scale, bins)
                if other == pid:
                    matching[worker, place] += 1
                else:
                    others[worker, place] += 1
            # The query's image was counted, unless its labels make it junk already.
            for index in itself[itself_starts[row] : itself_starts[row + 1]]:
                other = gallery_pids[index]
                if is_junk(pid, camid, other, gallery_camids[index]):
                    continue
                place = _bin_of(distances[row, index], squares[row], scale, bins)
                if other == pid:
                    matching[worker, place] -= 1
                else:
                    others[worker, place] -= 1
