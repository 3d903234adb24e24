"""Checks a step whose gradients overflow in fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context

_FACTOR = 1e36  # the loss stays finite, but its gradient times the scale does not
_TRIES = 20


def run(context: Context) -> None:
    """Takes some steps, one that overflows, and one more."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    network = parts.make_network(sizes, context.device, depth=sizes.short_depth)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, context.device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, context.device)
    trainer = parts.make_trainer(network, criterion, context.device, amp="fp16")
    batches = [
        parts.make_batch(labelled, sizes.small_batch, sizes.image, context.device, number)
        for number in range(3)
    ]
    _take_step(trainer, batches[0])
    before, scale = parts.state_of(trainer), _scale(trainer)
    parts.overflow_next(criterion, _FACTOR)
    trainer.run_step(batches[1])
    loss = parts.loss_of(trainer)
    parts.overflow_next(criterion, 1.0)
    changed = [
        name for name, value in parts.state_of(trainer).items() if _other(value, before, name)
    ]
    found.check(
        "a step that overflows changes no weight, statistic, memory or state of the optimizer",
        not changed,
        f"{len(before)} tensors, changed: {', '.join(changed[:5]) or 'none'}",
    )
    found.check("its loss is finite", bool(torch.isfinite(torch.tensor(loss))), f"{loss:.3g}")
    found.check(
        "the scale of the loss falls to half",
        _scale(trainer) == scale / 2,
        f"{scale:g} to {_scale(trainer):g}",
    )
    tries = _take_step(trainer, batches[2])
    moved = [name for name, value in parts.state_of(trainer).items() if _other(value, before, name)]
    found.check(
        f"a step is taken after it, in {_TRIES} tries",
        len(moved) > len(before) // 2,
        f"{len(moved)} of {len(before)} tensors move, at try {tries}",
    )


def _take_step(trainer: parts.Trainer, batch: parts.Batch) -> int:
    """Takes steps until the scale is small enough not to overflow; returns their number."""
    for tries in range(1, _TRIES):
        scale = _scale(trainer)
        trainer.run_step(batch)
        if _scale(trainer) >= scale:
            return tries
    return _TRIES


def _other(value: Tensor, before: dict[str, Tensor], name: str) -> bool:
    return name not in before or not torch.equal(value, before[name])


def _scale(trainer: parts.Trainer) -> float:
    return float(trainer.state_dict()["scaler"]["scale"])
