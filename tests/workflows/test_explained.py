"""Errors of torch that a run explains in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reid.engine.stopping import StopSignals
from reid.registry import ConfigError
from reid.workflows.errors import USER_ERRORS
from reid.workflows.session import explained


def test_a_batch_of_one_is_explained() -> None:
    with (
        pytest.raises(
            ConfigError, match=r"^[\w.]*batch_size: a batch of one.*\[1, 4, 1, 1\]"
        ) as told,
        StopSignals() as signals,
        explained(signals),
        explained(signals),  # a run enters it twice
    ):
        nn.BatchNorm2d(4)(torch.ones(1, 4, 1, 1))
    assert str(told.value).count("batch of one image") == 1
    assert issubclass(ConfigError, USER_ERRORS)


def test_other_errors_pass() -> None:
    with (
        pytest.raises(ValueError, match="expected 4D input"),
        StopSignals() as signals,
        explained(signals),
    ):
        nn.BatchNorm2d(4)(torch.ones(4))
