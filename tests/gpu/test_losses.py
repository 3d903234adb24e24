"""Losses on a GPU. `REID_GPU_TESTS_ON=cpu` tries the tests out."""

from __future__ import annotations

import os

import pytest
import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.right.waiting import waiting_lines
from reid.workflows.gpu_check.sizes import TOY

DEVICE = torch.device(os.environ.get("REID_GPU_TESTS_ON", "cuda"))
CPU = torch.device("cpu")
NAMES = ("O2CAPLoss", "CAPLoss", "ClusterContrastLoss", "SpCLLoss", "RLCCLoss", "EnsembleLoss",
         "CrossEntropy", "Triplet")  # fmt: skip
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
    ),
]


def stepped(name, device):
    """Losses, gradient and memory after a step in double precision; and a function for the step."""
    parts.import_parts()
    network = parts.make_network(TOY, CPU)
    labelled = parts.make_labelled(TOY.rows[0], 1 + network.num_parts, TOY.dim, device)
    torch.manual_seed(0)
    criterion = parts.make_criterion([{"name": name}], network, labelled, CPU).to(device)
    parts.relabel(criterion, labelled.labels, labelled.features, epoch=100)
    batch = parts.make_batch(labelled, 8, (1, 1), device)
    feature = parts.near_features(labelled, batch).requires_grad_()

    def step():
        embeddings = parts.embeddings_of(feature)
        losses = parts.losses(criterion, embeddings, batch)
        parts.backward(parts.total(losses))
        parts.finish_step(criterion, embeddings, batch)
        return losses

    found = {**step(), "gradient": feature.grad.clone(), **parts.memories(criterion)}
    return {key: value.detach().cpu().clone() for key, value in found.items()}, step


@pytest.mark.parametrize("name", NAMES)
def test_losses_agree_with_the_cpu(name):
    expected, seen = stepped(name, CPU)[0], stepped(name, DEVICE)[0]
    for key, value in expected.items():
        torch.testing.assert_close(seen[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_waits_for_nothing(name):
    if DEVICE.type == "cuda" and name != "CrossEntropy":  # may index by a mask
        assert not waiting_lines(stepped(name, DEVICE)[1])
