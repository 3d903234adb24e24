"""Bandwidth, matrix products and launches: the limits of this device."""

from __future__ import annotations

import torch

from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, time_calls

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def run(context: Context) -> None:
    """Measures each limit for a moment."""
    free_memory(context.device)
    _copies(context)
    _products(context)
    _launches(context)


def _copies(context: Context) -> None:
    sizes, device = context.sizes, context.device
    count = sizes.copied_mb * 2**20
    one = torch.zeros(count, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    timing = time_calls(lambda: other.copy_(one), device, context.clock, seconds=sizes.seconds / 2)
    rate = 2 * count / timing.seconds / 1e9
    context.found.number("copy_gb_s", rate)
    context.found.row(
        "Limits of this device", what=f"a copy of {sizes.copied_mb} MB on the device",
        rate=rate, unit="GB/s, read and written",
    )  # fmt: skip
    if device.type != "cuda":
        return
    host = torch.zeros(count // 4, dtype=torch.uint8).pin_memory()
    timing = time_calls(
        lambda: other[: len(host)].copy_(host, non_blocking=True), device, context.clock,
        seconds=sizes.seconds / 4,
    )  # fmt: skip
    rate = len(host) / timing.seconds / 1e9
    context.found.number("host_to_device_gb_s", rate)
    context.found.row(
        "Limits of this device", what="a copy to the device from page-locked memory",
        rate=rate, unit="GB/s",
    )  # fmt: skip


def _products(context: Context) -> None:
    sizes, device = context.sizes, context.device
    side = sizes.product
    kinds = [("fp16", False), ("bf16", False), ("fp32", False)]
    if device.type == "cuda":
        kinds.append(("fp32", True))
    for name, tf32 in kinds:
        if not context.enough(0.2, f"the product in {name}"):
            continue
        one = torch.randn(side, side, device=device).to(_DTYPES[name])
        other = torch.randn(side, side, device=device).to(_DTYPES[name])
        out = torch.empty_like(one)
        with exact_products():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            timing = time_calls(
                lambda: torch.mm(one, other, out=out),  # noqa: B023 - called before the next
                device, context.clock, seconds=sizes.seconds / 2,
            )  # fmt: skip
        label = "tf32" if tf32 else name
        rate = 2 * side**3 / timing.seconds / 1e12
        context.found.number(f"tflops_{label}", rate)
        context.found.row(
            "Limits of this device", what=f"a product of {side} x {side} matrices in {label}",
            rate=rate, unit="TFLOP/s",
        )  # fmt: skip


def _launches(context: Context) -> None:
    x = torch.zeros(1, device=context.device)
    timing = time_calls(
        lambda: x.add_(1), context.device, context.clock, seconds=context.sizes.seconds / 4
    )
    context.found.number("launch_us", 1e6 * timing.seconds)
    context.found.row(
        "Limits of this device", what="the smallest operation, one after the other",
        rate=1e6 * timing.seconds, unit="us",
    )  # fmt: skip
