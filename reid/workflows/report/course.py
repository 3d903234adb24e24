"""Judges training and its results, in sentences; `health.py` judges clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reid.workflows.report.health import Finding, percent

_WAITING = 0.3  # of a step's time
_LOST_QUERY, _MANY_LOST = 0.1, 0.1
_FLATTERED = 0.02  # best above final


def judge_losses(values: Sequence[float], supervised: bool, skipped: int = 0) -> list[Finding]:
    """Judges the course of the total loss.

    Args:
        values: Means of the loss over some steps each, oldest first.
        supervised: The labels are identities, so losses of different epochs are comparable.
        skipped: Number of reports of batches whose loss was not finite.
    """
    found = []
    if skipped or any(not math.isfinite(value) for value in values):
        found.append(
            Finding(
                "bad",
                f"Losses that are not finite came up ({skipped} reports nonfinite_step*.json)."
                if skipped
                else "Losses that are not finite came up.",
                "try a lower SOLVER.BASE_LR, SOLVER.CLIP_GRAD_NORM 1.0, or SOLVER.AMP off",
            )
        )
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return found
    tenth = max(1, len(finite) // 10)
    start, end = sum(finite[:tenth]) / tenth, sum(finite[-tenth:]) / tenth
    course = f"The loss went from {start:.3g} to {end:.3g}"
    if end < start:
        found.append(Finding("good", f"{course}."))
    elif supervised:
        found.append(
            Finding(
                "look",
                f"{course}: it does not fall.",
                "try a lower SOLVER.BASE_LR or a longer warm-up (SOLVER.WARMUP_EPOCHS)",
            )
        )
    else:
        found.append(
            Finding(
                "note",
                f"{course}. Each epoch has new labels and memories, so the loss alone does not "
                "show whether training goes well: look at the clusters and at the results.",
            )
        )
    return found


def judge_speed(
    data_time: Sequence[float], step_time: Sequence[float], num_workers: int | None
) -> list[Finding]:
    """Judges whether steps wait for images.

    Args:
        data_time: Seconds that each step waits.
        step_time: Seconds of each step, including the wait.
        num_workers: Processes that read images; None if unknown.
    """
    total = sum(step_time)
    if not total > 0:
        return []
    share = sum(data_time) / total
    if not share > _WAITING:
        return []
    now = "" if num_workers is None else f" (now {num_workers})"
    return [
        Finding(
            "look",
            f"Training waits for images during {percent(share)} of its steps' time.",
            f"raise DATALOADER.NUM_WORKERS{now} up to the number of CPUs, or try "
            "DATALOADER.CACHE ram",
        )
    ]


def judge_results(
    test_set: str, evaluations: Sequence[tuple[int, float]], metric: str
) -> list[Finding]:
    """Judges the course of the results.

    Args:
        test_set: The test set's name.
        evaluations: (epochs, the metric from 0 to 1), oldest first.
        metric: The number that chooses the best epoch.
    """
    known = [(epoch, value) for epoch, value in evaluations if math.isfinite(value)]
    if len(known) < 2:
        return []
    (start, before), (end, after) = known[0], known[-1]
    found = []
    gain = f"{metric} on {test_set} went from {percent(before, 1)} "
    gain += "before training" if start == 0 else f"after epoch {start}"
    gain += f" to {percent(after, 1)} after epoch {end}"
    if after > before:
        found.append(Finding("good", f"{gain}."))
    else:
        found.append(
            Finding(
                "bad",
                f"{gain}: training has made the model no better.",
                "try a lower SOLVER.BASE_LR, and look at the clusters below: wrong ones teach "
                "wrong things",
            )
        )
    epoch, best = max(known[1:], key=lambda entry: entry[1])
    if best - after > _FLATTERED:
        found.append(
            Finding(
                "look",
                f"{metric} was {100 * (best - after):.1f} points higher after epoch {epoch} than "
                "at the end.",
                f"try fewer epochs (SOLVER.MAX_EPOCHS {epoch}) or an earlier fall of the rate "
                "(SOLVER.MILESTONES); the weights of that epoch were chosen on the test set, which "
                "flatters them",
            )
        )
    return found


def judge_queries(test_set: str, precision: Sequence[float]) -> list[Finding]:
    """Judges how many queries are as good as lost.

    Args:
        test_set: The test set's name.
        precision: Average precision of each query that has a match, 0 to 1.
    """
    if not precision:
        return []
    lost = sum(value < _LOST_QUERY for value in precision)
    share = lost / len(precision)
    if share <= _MANY_LOST:
        return []
    return [
        Finding(
            "look",
            f"{lost:,} of {len(precision):,} queries of {test_set} ({percent(share)}) are as good "
            f"as lost: their average precision is below {percent(_LOST_QUERY)}.",
            "look at the hardest queries below: wrong labels, crops that show nobody, or cameras "
            "that the model does not know",
        )
    ]


def judge_camera_pairs(
    test_set: str,
    query_cameras: Sequence[int],
    gallery_cameras: Sequence[int],
    table: Sequence[Sequence[float | None]],
) -> list[Finding]:
    """Judges whether one pair of cameras is much worse than the others.

    Args:
        test_set: The test set's name.
        query_cameras: Cameras of the rows.
        gallery_cameras: Cameras of the columns.
        table: Mean average precision, 0 to 1; None where nothing matches.
    """
    pairs = [
        (value, one, other)
        for one, row in zip(query_cameras, table, strict=True)
        for other, value in zip(gallery_cameras, row, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if len(pairs) < 3:
        return []
    mean = sum(value for value, _, _ in pairs) / len(pairs)
    worst, one, other = min(pairs)
    if worst >= mean / 2:
        return []
    return [
        Finding(
            "look",
            f"From camera {one} to camera {other} of {test_set} the mAP is {percent(worst)}, over "
            f"all pairs of cameras it is {percent(mean)}.",
            f"look at images of cameras {one} and {other}: light, angle, size of the crops, or "
            "wrong labels",
        )
    ]
