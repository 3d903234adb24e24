"""The network that torch.compile makes, beside the plain one."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory

_LIMITS = {"off": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


class Warnings(logging.Handler):
    """Keeps the warnings that the framework logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the text."""
        self.texts.append(record.getMessage())


def run(context: Context) -> None:
    """Compares features and gradients of a short network, compiled in two ways."""
    parts.import_parts()
    device = context.device
    modes: tuple[parts.CompileMode, ...] = ("default", "reduce-overhead")
    precisions: tuple[str, ...] = ("off", "bf16", "fp16")
    if device.type == "cpu":  # CUDA graphs are the same as nothing there, and compilation is slow
        context.found.cut("reduce-overhead and half precision: they are for a CUDA device")
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
        parts.compiled(network, mode)
        labelled = parts.make_labelled(sizes.rows[0], 1 + plain.num_parts, sizes.dim, device)
        batch = parts.make_batch(labelled, sizes.small_batch, sizes.image, device)
        expected = _outcome(plain, batch, precision)
        seen = _outcome(network, batch, precision)
    finally:
        logging.getLogger("reid").removeHandler(told)
    name = f"{mode}, {'fp32' if precision == 'off' else precision}"
    found.check(f"the network was compiled ({name})", not told.texts, "; ".join(told.texts))
    errors = {
        key: float((value - expected[key]).norm() / expected[key].norm())
        for key, value in seen.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    limit = _LIMITS[precision]
    found.check(
        f"its features and gradients are the plain network's, to {limit:g} ({name})",
        errors[worst] <= limit,
        f"features {errors['features']:.1e}; the worst is {worst}: {errors[worst]:.1e}",
    )


def _outcome(network: nn.Module, batch: parts.Batch, precision: str) -> dict[str, Tensor]:
    """Features of a training step, and the gradients of some layers, from the last of three.

    CUDA graphs are recorded in the second call.
    """
    network.train()
    dtype = parts.DTYPES[precision]
    target = torch.randn(1 + 5, len(batch.image), 1, generator=torch.Generator().manual_seed(0)).to(
        batch.image.device
    )
    features = torch.empty(0)
    for _ in range(3):
        network.zero_grad(set_to_none=True)
        features = parts.banks_of(parts.forward(network, batch, dtype))
        parts.backward((features * features.detach().roll(1, 1) * target[: len(features)]).sum())
    gradients = {
        name: parameter.grad.float().clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and parameter.ndim > 1
    }
    return {"features": features.detach().float().clone(), **gradients}
