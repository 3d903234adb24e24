"""Full compilation on a GPU; on a CPU only graph capture."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import nn

from reid.workflows.gpu_check import parts


def compile_or_capture(network: nn.Module, mode: parts.CompileMode, device: torch.device) -> None:
    """Makes the network compile on its next call.

    On a CPU only the graph is captured and run uncompiled: the C++ compiler would take minutes.
    """
    if device.type == "cuda":
        parts.compiled(network, mode)
        return
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        parts.compiled(network, mode)
