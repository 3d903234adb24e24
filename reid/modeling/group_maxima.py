"""The largest numbers of groups of columns, in one pass that copies nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit
from torch import Tensor, from_numpy

_Numbers = npt.NDArray[np.int64]


def group_maxima(scores: Tensor, order: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each group, on the CPU.

    Args:
        scores: (M, B, P).
        order: (P,) columns, group after group.
        start: (groups,) where each group begins in `order`.

    Returns:
        (M, B, groups) the scores, and their columns in int64; of equal scores the first in `order`.
    """
    values, columns = _maxima(scores.detach().numpy(), order.numpy(), start.numpy())
    return from_numpy(values), from_numpy(columns)


# On one thread: Numba's other threads would spin after each call, beside the next products.
@njit(cache=True)
def _maxima(
    scores: npt.NDArray[Any], order: _Numbers, start: _Numbers
) -> tuple[npt.NDArray[Any], _Numbers]:
    banks, samples, count = scores.shape
    groups = len(start)
    values = np.empty((banks, samples, groups), scores.dtype)
    columns = np.empty((banks, samples, groups), np.int64)
    for number in range(banks * samples):
        bank, sample = number // samples, number % samples
        row = scores[bank, sample]
        for group in range(groups):
            stop = start[group + 1] if group + 1 < groups else count
            column = order[start[group]]
            largest = row[column]
            for place in range(start[group] + 1, stop):
                value = row[order[place]]
                if value > largest:
                    largest, column = value, order[place]
            values[bank, sample, group] = largest
            columns[bank, sample, group] = column
    return values, columns
