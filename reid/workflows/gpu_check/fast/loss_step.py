"""TMGF's losses alone: forward, backward to the features, and update of the memory."""

from __future__ import annotations

from collections.abc import Callable

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import Laps, free_memory, peak_mb, time_calls

_STEPS = 10


def run(context: Context) -> None:
    """Times a small and a large memory with a small and a large batch."""
    parts.import_parts()
    sizes, device = context.sizes, context.device
    network = parts.make_network(sizes, device, depth=sizes.short_depth)
    banks = 1 + network.num_parts
    for rows in sizes.rows:
        for size in (sizes.small_batch, sizes.large_batch):
            if not context.enough(sizes.seconds, f"{rows:,} rows, batch {size}"):
                continue
            labelled = parts.make_labelled(rows, banks, sizes.dim, device)
            criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
            batch = parts.make_batch(labelled, size, (1, 1), device)
            feature = parts.near_features(labelled, batch).requires_grad_()
            memory = 4 * labelled.banks.numel() / 2**20
            del labelled
            free_memory(device)
            before = peak_mb(device)

            def step(lap: Callable[[str], None] = lambda part: None) -> None:
                feature.grad = None  # noqa: B023
                lap("before")
                embeddings = parts.embeddings_of(feature)  # noqa: B023
                losses = parts.losses(criterion, embeddings, batch)  # noqa: B023
                total = parts.total(losses)
                lap("forward")
                parts.backward(total)
                lap("backward")
                parts.finish_step(criterion, embeddings, batch)  # noqa: B023
                lap("commit")

            timing = time_calls(step, device, context.clock, seconds=sizes.seconds / 2)
            laps = Laps(device)
            for _ in range(_STEPS):
                step(laps.lap)
            split = {name: value / _STEPS for name, value in laps.milliseconds().items()}
            context.found.row(
                f"TMGF's losses, {banks} banks of {sizes.dim} dimensions",
                rows=rows, batch=size, ms=1e3 * timing.seconds, lowest_to_highest=timing.spread,
                forward_ms=split["forward"], backward_ms=split["backward"],
                commit_ms=split["commit"], memory_MB=memory,
                peak_above_MB=None if timing.peak_mb is None or before is None
                else timing.peak_mb - before,
            )  # fmt: skip
            context.found.number(f"ms_{rows}_{size}", 1e3 * timing.seconds)
