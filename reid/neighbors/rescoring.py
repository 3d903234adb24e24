"""True scores of candidates, and whether a row's list is certain."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from reid.neighbors.candidates import Candidates
from reid.neighbors.kernels import Doubles, Flags, Floats, Indices, dot, insert, run_in_pieces


@njit(cache=True)
def _select(scores: Floats, index: Indices, count: int, best: int) -> None:
    """Moves the `best` best of `count` candidates to the front, the worst of these last."""
    low, high, place = 0, count - 1, best - 1
    while low < high:
        pivot = scores[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while scores[i] > pivot:
                i += 1
            while scores[j] < pivot:
                j -= 1
            if i <= j:
                scores[i], scores[j] = scores[j], scores[i]
                index[i], index[j] = index[j], index[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break


def rescore(
    rows: Floats, half_norms: Doubles, which: Indices, found: Candidates, bound: float, unit: float
) -> tuple[Indices, Flags]:
    """The k best candidates of the rows `which`, and whether a neighbour may be missing.

    A candidate's true score is at most its score + `bound`; both are scaled by `unit`.
    """
    lists, doubtful = np.empty((len(which), found.k), np.int32), np.zeros(len(which), np.bool_)
    run_in_pieces(
        _rescore, len(which), found.scores.shape[1] * rows.shape[1],
        rows, half_norms, which, found.scores, found.index, found.filled, found.lost, bound, unit,
        lists, doubtful,
    )  # fmt: skip
    return lists, doubtful


@njit(parallel=True, cache=True)
def _rescore(
    start: int,
    stop: int,
    rows: Floats,
    half_norms: Doubles,
    which: Indices,
    scores: Floats,
    index: Indices,
    filled: Indices,
    lost: Floats,
    bound: float,
    unit: float,
    lists: Indices,
    doubtful: Flags,
) -> None:
    count, k = len(rows), lists.shape[1]
    for number in prange(start, stop):
        i = which[number]
        best = np.full(k, -np.inf, np.float64)
        best_index = np.full(k, count, np.int32)
        # The best by their bounds come first: what they leave is soon out of reach.
        _select(scores[number], index[number], filled[number], k)
        for place in range(filled[number]):
            j = index[number, place]
            if j != i and scores[number, place] + bound < best[k - 1] * unit:
                continue
            score = np.inf if j == i else dot(rows[i], rows[j]) - half_norms[j]
            if score > best[k - 1] or (score == best[k - 1] and j < best_index[k - 1]):
                insert(score, j, best, best_index)
        for place in range(k):
            lists[number, place] = best_index[place]
        missed = best[0] != np.inf or best[k - 1] * unit <= lost[number] + bound
        doubtful[number] = missed and lost[number] > -np.inf
