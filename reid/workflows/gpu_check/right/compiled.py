"""Compares the network from torch.compile with the plain one."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.capture import compile_or_capture
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory

_LIMITS = {"features": 1e-4, "gradients": 1e-3}
_MORE = 1.5  # half precision rounds in another order


class Warnings(logging.Handler):
    """Stores the warnings that the framework logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Stores the text."""
        self.texts.append(record.getMessage())


def run(context: Context) -> None:
    """Compares features and gradients of a short network, compiled in two ways."""
    parts.import_parts()
    device = context.device
    modes: tuple[parts.CompileMode, ...] = ("default", "reduce-overhead")
    precisions: tuple[str, ...] = ("off", "bf16", "fp16")
    if device.type == "cpu":
        context.found.cut("compilation: on a CPU the graph is only captured, and runs uncompiled")
        modes, precisions = modes[:1], precisions[:1]
    for mode in modes:
        for precision in precisions:
            if context.enough(5 if device.type == "cuda" else 1, f"{mode} in {precision}"):
                with exact_products():
                    _compare(context, mode, precision)


def _compare(context: Context, mode: parts.CompileMode, precision: str) -> None:
    sizes, found, device = context.sizes, context.found, context.device
    torch._dynamo.reset()
    free_memory(device)
    plain = parts.make_network(sizes, device, depth=sizes.short_depth, drop_path=0.0)
    network = copy.deepcopy(plain)
    told = Warnings()
    logging.getLogger("reid").addHandler(told)
    try:
        compile_or_capture(network, mode, device)
        labelled = parts.make_labelled(sizes.rows[0], 1 + plain.num_parts, sizes.dim, device)
        batch = parts.make_batch(labelled, sizes.small_batch, sizes.image, device)
        reference = _outcome(plain, batch, "off")
        expected = _outcome(plain, batch, precision)
        seen = _outcome(network, batch, precision)
    finally:
        logging.getLogger("reid").removeHandler(told)
    name = f"{mode}, {'fp32' if precision == 'off' else precision}"
    found.check(f"the network was compiled ({name})", not told.texts, "; ".join(told.texts))
    for what, limit in _LIMITS.items():
        error = _error(seen[what], reference[what])
        allowed = limit + _MORE * _error(expected[what], reference[what])
        found.check(
            f"its {what} are as close to those in fp32 as the plain network's ({name})",
            error <= allowed,
            f"relative difference {error:.1e}, at most {allowed:.1e}",
        )


def _error(seen: Tensor, expected: Tensor) -> float:
    return float((seen - expected).norm() / expected.norm())


def _outcome(network: nn.Module, batch: parts.Batch, precision: str) -> dict[str, Tensor]:
    """Features of a training step and all gradients, from the last of three calls.

    CUDA graphs are recorded in the second call.
    """
    network.train()
    dtype = parts.DTYPES[precision]
    features = torch.empty(0)
    for _ in range(3):
        network.zero_grad(set_to_none=True)
        features = parts.banks_of(parts.forward(network, batch, dtype))
        weight = torch.linspace(-1, 1, features.shape[1], device=features.device)[:, None]
        parts.backward((features * features.detach().roll(1, 1) * weight).sum())
    gradients = [
        parameter.grad.float().flatten()
        for parameter in network.parameters()
        if parameter.grad is not None
    ]
    return {"features": features.detach().float().clone(), "gradients": torch.cat(gradients)}
