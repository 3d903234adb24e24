"""torch.compile for a network; if it fails, the network runs uncompiled."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from reid.structures import Batch, Embeddings

logger = logging.getLogger(__name__)

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


def compile_network(network: nn.Module, mode: CompileMode = "default") -> None:
    """Makes `torch.compile` run a network from its next call on; parameters and names stay.

    The first call of a new kind compiles, which takes long: training or not, another precision, the
    first change of the batch's size. If compilation fails, for instance without a C++ compiler, a
    warning says why, and the network runs uncompiled from then on.

    Args:
        network: Batch -> Embeddings; changed in place.
        mode: The mode of `torch.compile`. `reduce-overhead` and `max-autotune` use CUDA graphs on a
            GPU, which save launching each operation; `max-autotune` also tries out kernels.
    """
    plain = network.forward
    compiled = torch.compile(plain, mode=mode)

    def forward(batch: Batch) -> Embeddings:
        try:
            # A CUDA graph may overwrite the previous call's outputs.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            embeddings: Embeddings = compiled(batch)
            if mode != "default" and not torch.is_grad_enabled():
                embeddings = embeddings.map(Tensor.clone)
        except TorchDynamoException as error:
            logger.warning(
                "The network cannot be compiled and runs uncompiled: %s",
                str(error).strip().partition("\n")[0],
            )
            network.forward = plain
            embeddings = plain(batch)
        return embeddings

    network.forward = forward
