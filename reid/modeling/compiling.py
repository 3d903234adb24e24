"""torch.compile for a network, with a way back."""

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
    """Has `torch.compile` run a network from its next call on; parameters and names stay.

    Calls of a new kind (training or not, another precision, another size of batch for the first
    time) take as long as compilation does. Where compilation fails, for want of a C++ compiler for
    instance, a warning says why, and the network runs as it is from then on.

    Args:
        network: Batch -> Embeddings; changed in place.
        mode: Of `torch.compile`. The other two use CUDA graphs on a GPU, which spare it the launch
            of every operation; `max-autotune` also tries out kernels.
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
                "The network cannot be compiled and runs as it is: %s",
                str(error).strip().partition("\n")[0],
            )
            network.forward = plain
            embeddings = plain(batch)
        return embeddings

    network.forward = forward
