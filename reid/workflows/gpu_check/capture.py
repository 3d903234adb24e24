"""Compilation where a device is worth it, and its first half where not."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import nn

from reid.workflows.gpu_check import parts


def compile_or_capture(network: nn.Module, mode: parts.CompileMode, device: torch.device) -> None:
    """Has the network compiled from its next call on.

    On a CPU its graph is captured, but runs as it is: the C++ compiler would take minutes.
    """
    if device.type == "cuda":
        parts.compiled(network, mode)
        return
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        parts.compiled(network, mode)
