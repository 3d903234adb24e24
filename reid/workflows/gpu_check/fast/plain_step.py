"""Compares the trainer's step with the same step in plain code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.fast.step import PRECISIONS, Prepared, prepare
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.plain import PlainLosses, PlainNetwork
from reid.workflows.gpu_check.timing import free_memory, time_calls

_LIMIT = 1e-4


def run(context: Context) -> None:
    """Compares the first loss in fp32, then times both in fp16 and in fp32."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    title = f"A step of {sizes.small_batch} images, {sizes.rows[0]:,} rows in the memory"
    for precision in ("fp16", "fp32"):
        if not context.enough(2 * sizes.seconds, f"the step in {precision}"):
            continue
        prepared = prepare(context, PRECISIONS[precision], sizes.small_batch, drop_path=0.0)
        plain, network_alone = plain_step(prepared, precision)
        if precision == "fp32":
            _compare(context, prepared)
        slow = time_calls(
            plain, context.device, context.clock, seconds=sizes.seconds, warm_up=1, rounds=1
        )
        slow_network = time_calls(
            network_alone, context.device, context.clock, seconds=sizes.seconds / 2, warm_up=1,
            rounds=1,
        )  # fmt: skip
        free_memory(context.device)
        fast = time_calls(
            lambda: prepared.trainer.run_step(prepared.batch),  # noqa: B023
            context.device, context.clock, seconds=sizes.seconds / 2,
        )  # fmt: skip
        found.row(
            title, precision=precision, plain_ms=1e3 * slow.seconds,
            of_which_network_and_optimizer_ms=1e3 * slow_network.seconds,
            ours_ms=1e3 * fast.seconds, ratio=slow.seconds / fast.seconds,
            plain_peak_MB=slow.peak_mb, our_peak_MB=fast.peak_mb,
        )  # fmt: skip
        if precision == "fp16":
            found.number("ratio_small", slow.seconds / fast.seconds)
    found.note(
        "The plain step: attention as softmax(q k^T) v, losses and memory sample by sample in each "
        "of the six banks, SGD parameter by parameter, in the same precision and with the same "
        "scaling of the loss."
    )


def _compare(context: Context, prepared: Prepared) -> None:
    """Checks that both steps give the same loss for the same weights, without TF32."""
    with exact_products(), torch.no_grad():
        losses = _plain_losses(prepared)
        rows = prepared.labelled.labels.proxy[prepared.batch.index]
        network = PlainNetwork(copy.deepcopy(prepared.network)).train()
        banks = network(prepared.batch.image, prepared.batch.camid)
        expected = float(losses(banks, rows))
        embeddings = parts.forward(copy.deepcopy(prepared.network), prepared.batch)
        criterion = copy.deepcopy(prepared.criterion)
        seen = float(parts.total(parts.losses(criterion, embeddings, prepared.batch)))
    context.found.check(
        f"the plain step has the same loss in fp32, to {_LIMIT:g}",
        abs(seen / expected - 1) <= _LIMIT,
        f"{expected:.6f} and {seen:.6f}",
    )


def _plain_losses(prepared: Prepared) -> PlainLosses:
    rows = torch.zeros_like(prepared.labelled.banks)
    rows[:, prepared.labelled.labels.proxy] = prepared.labelled.banks
    return PlainLosses(prepared.labelled.labels, rows)


def plain_step(prepared: Prepared, precision: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """A function that takes a plain step, and one that takes it without the losses."""
    network = PlainNetwork(copy.deepcopy(prepared.network)).train()
    device, dtype = prepared.batch.image.device, parts.DTYPES[PRECISIONS[precision]]
    losses, batch = _plain_losses(prepared), prepared.batch
    rows = prepared.labelled.labels.proxy[batch.index]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=3.5e-4, momentum=0.9, weight_decay=5e-4, foreach=False
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            banks: Tensor = network(batch.image, batch.camid)
        loss = loss_of(banks)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        return banks.detach()

    def whole() -> None:
        losses.update(step(lambda banks: losses(banks, rows)), rows)

    def without_losses() -> None:
        step(lambda banks: (banks * banks.detach().roll(1, 1)).sum())

    return whole, without_losses
