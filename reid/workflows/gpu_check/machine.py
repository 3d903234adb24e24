"""Describes the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from reid.workflows.gpu_check.findings import Context

_PACKAGES = ("torchvision", "timm", "numpy", "numba", "scipy", "triton")


def run(context: Context) -> None:
    """Reports device, memory and versions."""
    found = context.found
    found.number("torch", torch.__version__)
    found.number("python", platform.python_version())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.number("cpu_cores", cores)
    found.number("platform", platform.platform())
    for name in _PACKAGES:
        try:
            found.number(name, version(name))
        except PackageNotFoundError:
            found.number(name, None)
    if context.device.type != "cuda":
        found.number("device", f"CPU ({platform.processor() or platform.machine()})")
        return
    about = torch.cuda.get_device_properties(context.device)
    found.number("device", about.name)
    found.number("memory_gib", about.total_memory / 2**30)
    found.number("multiprocessors", about.multi_processor_count)
    found.number("capability", f"{about.major}.{about.minor}")
    found.number("cuda", torch.version.cuda)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found.number("cudnn", str(cudnn))
    found.number("driver", _driver())
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found.number("multiplies bfloat16 itself", "yes" if bfloat16 else "no")
    x = torch.arange(1024, device=context.device, dtype=torch.float64)
    found.check(
        "a sum on the device is right", float(x.sum()) == 1023 * 512, f"{float(x.sum()):.0f}"
    )


def _driver() -> str | None:
    """The driver's version, if the system shows it without NVIDIA's tools."""
    try:
        with open("/proc/driver/nvidia/version") as file:  # noqa: PTH123
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)
