"""Training steps on a GPU, with a tiny TMGF. `REID_GPU_TESTS_ON=cpu` tries the tests out."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from reid.modeling.ibn import IBN
from reid.solver import build_optimizer
from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.right.waiting import waiting_lines
from reid.workflows.gpu_check.sizes import TOY

DEVICE = torch.device(os.environ.get("REID_GPU_TESTS_ON", "cuda"))
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
    ),
]


def make(device, amp="off", clip=0.0):
    parts.import_parts()
    network = parts.make_network(TOY, CPU, drop_path=0.0).to(device)
    labelled = parts.make_labelled(TOY.rows[0], 1 + network.num_parts, TOY.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, amp=amp, clip=clip)
    return trainer, [parts.make_batch(labelled, 8, TOY.image, device, seed) for seed in range(3)]


def test_steps_agree_with_the_cpu():
    states = []
    for device in (CPU, DEVICE):
        trainer, batches = make(device, clip=1.0)
        with exact_products():
            for batch in batches:
                trainer.run_step(batch)
        states.append(parts.state_of(trainer))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name].cpu(), value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_steps_in_half_precision_move_finite_weights(amp):
    trainer, batches = make(DEVICE, amp)
    before = parts.state_of(trainer)
    for _ in range(10):  # the first ones may overflow
        for batch in batches:
            trainer.run_step(batch)
    after = parts.state_of(trainer)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert not torch.equal(before["model.backbone.net.pos_embed"],
                           after["model.backbone.net.pos_embed"])  # fmt: skip


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_a_step_waits_for_nothing(amp):
    trainer, batches = make(DEVICE, amp, clip=1.0)
    for batch in batches:
        trainer.run_step(batch)
    if DEVICE.type == "cuda":
        assert not waiting_lines(lambda: trainer.run_step(batches[0]))


def test_torch_still_detects_synchronisation():
    if DEVICE.type == "cuda":
        x = torch.ones(1, device=DEVICE)
        assert len(waiting_lines(lambda: x.item())) == 1


def test_an_overflow_in_the_first_step_leaves_the_momentum_finite():
    layer = torch.nn.Linear(2, 2).to(DEVICE)
    optimizer = build_optimizer(layer.parameters(), "SGD", lr=1.0, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE.type)
    for factor in (torch.inf, 1.0):
        scaler.scale(factor * layer(torch.ones(1, 2, device=DEVICE)).sum()).backward()
        before = layer.bias.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.bias.detach(), before - 1)


def test_grouped_batchnorm_has_the_statistics_of_its_groups():
    shared = torch.nn.Sequential(torch.nn.BatchNorm2d(4)).to(DEVICE)
    plain = copy.deepcopy(shared)
    parts.share_statistics(shared)
    x = torch.randn(8, 4, 5, 3, device=DEVICE)
    torch.testing.assert_close(shared(x), plain(x), rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_stem_keeps_half_precision():
    feature = torch.randn(2, 6, 5, 4, device=DEVICE, dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert IBN(6).to(DEVICE)(feature).dtype == torch.bfloat16


@pytest.mark.parametrize(("precision", "closeness"), [("fp32", 0.99999), ("fp16", 0.98),
                                                      ("bf16", 0.9)])  # fmt: skip
def test_extracted_features_agree_with_the_cpu(precision, closeness):
    parts.import_parts()
    labelled = parts.make_labelled(12, 6, TOY.dim, CPU)
    records = parts.image_records(labelled)
    index = torch.arange(12)
    images = torch.randn(12, 3, *TOY.image, generator=torch.Generator().manual_seed(0))
    batches = [parts.as_batch(images, labelled.camids, index)]
    found = []
    for device, kind in ((CPU, "fp32"), (DEVICE, precision)):
        network = parts.make_network(TOY, CPU).to(device)
        with exact_products():
            features = parts.extract(network, batches, records, device, kind)
        found.append(parts.compared(features).cpu())
    assert float((found[0] * found[1]).sum(1).min()) > closeness
