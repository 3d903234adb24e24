#!/usr/bin/env python
"""Times a step of O2CAP's losses on all banks against the equations, sample by sample.

A step is forward, backward to the features, and the update of the memory. Tests also use
`plain_losses` and `plain_update` as their oracle.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import measure, report
from torch import Tensor
from torch.nn import functional as F

from reid.projects.o2cap import O2CAPLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

BATCH, IMAGES_PER_PROXY = 32, 4
TEMPERATURE, MOMENTUM, BALANCE, PART_WEIGHT = 0.07, 0.2, 0.15, 0.1
NUM_POSITIVES, NUM_NEGATIVES = 3, 50
STEPS = 10


Found = tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]]


class Problem(NamedTuple):
    """The input of a step.

    Attributes:
        labels: Labels of P images, each of which is one proxy.
        bank: (1 + K, P, D), the features of the images, which are also the memory.
        row: (B,) proxies of the batch.
        feature: (1 + K, B, D) unit vectors.
    """

    labels: PseudoLabels
    bank: Tensor
    row: Tensor
    feature: Tensor


def make_problem(proxies: int, banks: int, dim: int, cameras: int = 15) -> Problem:
    """Makes clusters of four cameras each; the batch's features are near their proxies."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(proxies) // 4
    camids = (cluster * 7 + torch.arange(proxies) % 4) % cameras
    labels = PseudoLabels.from_clusters(cluster, camids)
    centre = torch.randn(banks, proxies // 4 + 1, dim, generator=generator)
    noise = torch.randn(banks, proxies, dim, generator=generator)
    bank = torch.empty(banks, proxies, dim)
    bank[:, labels.proxy] = F.normalize(centre[:, cluster] + noise, dim=2)
    row = torch.randperm(proxies, generator=generator)[: BATCH // IMAGES_PER_PROXY]
    row = row.repeat_interleave(IMAGES_PER_PROXY)[:BATCH]
    near = bank[:, row] + 0.05 * torch.randn(banks, len(row), dim, generator=generator)
    return Problem(labels, bank, row, F.normalize(near, dim=2))


def plain_losses(
    feature: Tensor,
    bank: Tensor,
    y: int,
    labels: PseudoLabels,
    *,
    temperature: float = TEMPERATURE,
    balance: float = BALANCE,
    num_positives: int = NUM_POSITIVES,
    num_negatives: int = NUM_NEGATIVES,
) -> tuple[Tensor, Tensor]:
    """Offline and online loss of one sample in one bank (TMGF, equations 7 and 8).

    Args:
        feature: (D,) unit vector.
        bank: (P, D).
        y: The sample's proxy.
        labels: Cluster and camera of each proxy.
        temperature: tau.
        balance: Weight of the feature's own similarity in the online choice.
        num_positives: Online positives.
        num_negatives: Negatives.
    """
    s = bank @ feature
    q = (balance * s + (1 - balance) * (bank @ bank[y])).detach()

    def loss(positives: Tensor, ranking: Tensor) -> Tensor:
        order = ranking.argsort(descending=True)
        others = order[~torch.isin(order, positives)][:num_negatives]
        log_prob = F.log_softmax(s[torch.cat((positives, others))] / temperature, 0)
        return -log_prob[: len(positives)].mean()

    offline = (labels.proxy_to_cluster == labels.proxy_to_cluster[y]).nonzero()[:, 0]
    best = []
    for camera in labels.proxy_to_camera.unique():
        members = (labels.proxy_to_camera == camera).nonzero()[:, 0]
        best.append(members[q[members].argmax()])
    candidates = torch.stack(best)
    online = candidates[q[candidates].argsort(descending=True)[:num_positives]]
    return loss(offline, s.detach()), loss(online, q)


def plain_update(bank: Tensor, row: Tensor, feature: Tensor, momentum: float = MOMENTUM) -> Tensor:
    """The memory (1 + K, P, D) after a batch, sample by sample (TMGF, equation 6)."""
    bank = bank.clone()
    for i, y in enumerate(row.tolist()):
        for m in range(len(bank)):
            bank[m, y] = F.normalize(momentum * bank[m, y] + (1 - momentum) * feature[m, i], dim=0)
    return bank


def plain_step(problem: Problem) -> Found:
    """The total loss, its gradient and the memory after the step, sample by sample."""
    labels, bank, row, feature = problem
    feature = feature.clone().requires_grad_()
    total = torch.zeros(())
    for m in range(len(bank)):
        weight = (1.0 if m == 0 else PART_WEIGHT / (len(bank) - 1)) / len(row)
        for i, y in enumerate(row.tolist()):
            offline, online = plain_losses(feature[m, i], bank[m], y, labels)
            total = total + weight * (offline + online)
    total.backward()
    assert feature.grad is not None
    bank = plain_update(bank, row, feature.detach())
    return total.item(), feature.grad.numpy(), bank.numpy()


class Ready(NamedTuple):
    """A loss with its labels, and the step's input."""

    loss: O2CAPLoss
    problem: Problem


def make_ready(proxies: int, banks: int, dim: int) -> Ready:
    """Builds the loss with the problem's memory."""
    problem = make_problem(proxies, banks, dim)
    # Image p is the only image of proxy p, so the memory starts with the features.
    images = problem.bank[:, problem.labels.proxy]
    loss = O2CAPLoss(
        temperature=TEMPERATURE, momentum=MOMENTUM, balance=BALANCE, part_weight=PART_WEIGHT,
        num_positives=NUM_POSITIVES, num_negatives=NUM_NEGATIVES,
    )  # fmt: skip
    loss.set_labels(problem.labels, FeatureSet.of(images[0], unit=images.transpose(0, 1)))
    return Ready(loss.train(), problem)


def steps(ready: Ready) -> Found:
    """Takes `STEPS` steps; returns total loss, gradient and memory after the first."""
    loss, (labels, _, row, given) = ready
    image_of = torch.empty_like(labels.proxy)
    image_of[labels.proxy] = torch.arange(len(labels))
    index = image_of[row]
    batch = Batch.of(torch.empty(len(row), 0), index=index)
    first = None
    for _ in range(STEPS):
        feature = given.clone().requires_grad_()
        banks = feature.transpose(0, 1)
        embeddings = Embeddings(banks, banks, banks, banks[:, 0])
        total = torch.stack([*loss(embeddings, batch).values()]).sum()
        total.backward()
        assert feature.grad is not None
        loss.commit(embeddings.map(Tensor.detach), batch)
        if first is None:
            first = total.item(), feature.grad.numpy(), loss.memory.rows.clone().numpy()
    assert first is not None
    return first


def main() -> None:
    """Parses the arguments, measures both sides, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxies", type=int, default=6000, help="P (default: %(default)s)")
    parser.add_argument("--banks", type=int, default=6, help="1 + K (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="D (default: %(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="if it takes too long")
    arguments = parser.parse_args()
    args = (arguments.proxies, arguments.banks, arguments.dim)
    small = (64, 2, 16)
    seconds, extra, _, found, *_ = measure(steps, make_ready, *args, warm_up=small)
    baseline, agrees = None, None
    if not arguments.no_baseline:
        *baseline, _, plain = measure(plain_step, make_problem, *args, warm_up=small)[:4]
        agrees = abs(found[0] - plain[0]) < 1e-5 * plain[0] and all(
            bool(np.abs(one - other).max() < 1e-6)
            for one, other in zip(found[1:], plain[1:], strict=True)
        )
    report(
        "losses", f"batch {BATCH}, {args[0]:,} proxies x {args[1]} banks x {args[2]}",
        (seconds / STEPS, extra), baseline, agrees,
    )  # fmt: skip


if __name__ == "__main__":
    main()
