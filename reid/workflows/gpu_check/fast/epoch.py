"""An epoch on MSMT17, added up from what the other sections have measured."""

from __future__ import annotations

from collections.abc import Callable

from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.sizes import (
    EVALUATION_PERIOD,
    FULL,
    STEPS_PER_EPOCH,
    TEST_IMAGES,
    TRAIN_IMAGES,
)


def run(context: Context) -> None:
    """Adds up extraction, labels, steps and a share of an evaluation; runs nothing."""
    found = context.found
    if context.sizes != FULL:
        found.note("At toy sizes the sum means nothing; it only tests this section.")
    extraction = _slowest(
        context, ("extraction", "images_s_bf16"), ("loading", "extraction_images_s")
    )
    step = _slowest(
        context, ("training", "step_ms_small_fp16"), ("loading", "step_ms"), inverse=False
    )
    labels = context.number("pseudo_labels", "seconds_few")
    ranking = context.number("ranking", "seconds")
    stages: list[tuple[str, float | None]] = [
        (
            f"extraction of {TRAIN_IMAGES:,} training images",
            None if extraction is None else TRAIN_IMAGES / extraction,
        ),
        ("search, Jaccard distances, clusters", labels),
        (f"{STEPS_PER_EPOCH} steps of 32 images", _times(step, STEPS_PER_EPOCH / 1e3)),
        (
            f"extraction of {TEST_IMAGES:,} test images, every {EVALUATION_PERIOD}th epoch",
            None if extraction is None else TEST_IMAGES / extraction / EVALUATION_PERIOD,
        ),
        (f"ranking, every {EVALUATION_PERIOD}th epoch", _times(ranking, 1 / EVALUATION_PERIOD)),
    ]
    known = [seconds for _, seconds in stages if seconds is not None]
    total = sum(known)
    for stage, seconds in stages:
        share = None if seconds is None or not total else f"{seconds / total:.1%}"
        found.row("An epoch of TMGF on MSMT17", stage=stage, seconds=seconds, share=share)
        if seconds is None:
            found.cut(f"{stage}: it was not measured")
    found.row("An epoch of TMGF on MSMT17", stage="all that was measured", seconds=total, share="")
    found.number("seconds", total)
    found.number("hours for 50 epochs", 50 * total / 3600)


def _slowest(context: Context, *numbers: tuple[str, str], inverse: bool = True) -> float | None:
    """The slowest measurement: the smallest rate, or the largest time."""
    values = [context.number(section, name) for section, name in numbers]
    known = [value for value in values if value is not None]
    choose: Callable[[list[float]], float] = min if inverse else max
    return choose(known) if known else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
