"""What clustering in shards takes, as docs/scale.md states it."""

from __future__ import annotations

from reid.neighbors.plan import Plan

# Entries of a row for each of k1, as features of persons have them; no bound.
_SET, _MEAN = 1.5, 2.5
_STARTS = 16


def bytes_of_candidates(room: int) -> int:
    """What the candidates of a row take."""
    return 8 * room + 12


def bytes_on_disk(dim: int, k1: int, half: int, k2: int, plan: Plan) -> dict[str, float]:
    """About how many bytes a row takes on disk beside its features, at each stage of the work.

    Args:
        dim: D.
        k1: Length of the lists.
        half: Of the half lists.
        k2: Rows averaged.
        plan: How candidates are found.
    """
    size = 2 if plan.half else 4
    compared = size * (plan.dims + 1) + 4 if plan.dims else size * dim * plan.half
    lists = 4 * (k1 + half + k2)
    members = 4 * (k1 + half) + 8
    sets, means = _STARTS + 8 * _SET * k1, _STARTS + 8 * _MEAN * k1
    return {
        "search": 12 + compared + bytes_of_candidates(plan.room) + lists,
        "sets": 8 + 4 * k2 + max(4 * (k1 + half), sets) + members,
        "means": sets + 4 * k2 + means,
        "distances": 3 * means,
    }
