#!/usr/bin/env python
"""Times a step of O2CAP's losses on all banks against the equations, sample by sample.

A step is forward, backward to the features, and the update of the memory. Tests also use
`plain_losses` and `plain_update` as their oracle.

Floor: the product of the memory with the features and with what the online choice is made from,
4 (1 + K) B P D FLOPs, which reads the memory once; and reading the rows of the chosen proxies
twice, for forward and backward, and copying those that the update moves.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from floors import Parts, copy_speed, read_speed, typical_seconds
from measure import measure, report
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.memories import MemoryDtype
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
    """A loss with its labels, the step's input, and what the first step gave."""

    loss: O2CAPLoss
    problem: Problem
    found: Found


def make_ready(proxies: int, banks: int, dim: int, dtype: MemoryDtype = "fp32") -> Ready:
    """Builds the loss with the problem's memory, and takes the first step."""
    problem = make_problem(proxies, banks, dim)
    # Image p is the only image of proxy p, so the memory starts with the features.
    images = problem.bank[:, problem.labels.proxy]
    loss = O2CAPLoss(
        temperature=TEMPERATURE, momentum=MOMENTUM, balance=BALANCE, part_weight=PART_WEIGHT,
        num_positives=NUM_POSITIVES, num_negatives=NUM_NEGATIVES, memory_dtype=dtype,
    )  # fmt: skip
    loss.set_labels(problem.labels, FeatureSet.of(images[0], unit=images.transpose(0, 1)))
    total, gradient = step(loss.train(), problem)
    return Ready(loss, problem, (total, gradient, loss.memory.rows.float().numpy().copy()))


def step(loss: O2CAPLoss, problem: Problem) -> tuple[float, np.ndarray[Any, Any]]:
    """Takes a step; returns the total loss and its gradient."""
    labels, _, row, given = problem
    image_of = torch.empty_like(labels.proxy)
    image_of[labels.proxy] = torch.arange(len(labels))
    batch = Batch.of(torch.empty(len(row), 0), index=image_of[row])
    feature = given.clone().requires_grad_()
    banks = feature.transpose(0, 1)
    embeddings = Embeddings(banks, banks, banks, banks[:, 0])
    total = torch.stack([*loss(embeddings, batch).values()]).sum()
    total.backward()
    assert feature.grad is not None
    loss.commit(embeddings.map(Tensor.detach), batch)
    return total.item(), feature.grad.numpy()


def steps(ready: Ready) -> Found:
    """Takes `STEPS` steps; returns total loss, gradient and memory after the first of all."""
    for _ in range(STEPS):
        step(ready.loss, ready.problem)
    return ready.found


def least(proxies: int, banks: int, dim: int, dtype: MemoryDtype = "fp32") -> Parts:
    """The floor of `STEPS` steps; the product is made in the faster of two orders."""
    rows, pair = torch.randn(banks, proxies, dim), torch.randn(banks, 2 * BATCH, dim)
    if dtype == "bf16":
        rows, pair = rows.bfloat16(), pair.bfloat16()
    product = min(
        typical_seconds(lambda: rows @ pair.transpose(1, 2)),
        typical_seconds(lambda: pair @ rows.transpose(1, 2)),
    )
    row_bytes = banks * BATCH * dim * 4
    chosen = min(NUM_NEGATIVES, proxies) * 2 + NUM_POSITIVES + 4  # 4 proxies are in a cluster
    read = 2 * chosen * row_bytes / read_speed(chosen * row_bytes)
    moved = row_bytes / copy_speed(row_bytes)
    return {"product": STEPS * product, "chosen rows": STEPS * read, "update": STEPS * moved}


def main() -> None:
    """Parses the arguments, measures both sides, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxies", type=int, default=6000, help="P (default: %(default)s)")
    parser.add_argument("--banks", type=int, default=6, help="1 + K (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="D (default: %(default)s)")
    parser.add_argument(
        "--memory-dtype", choices=["fp32", "bf16"], default="fp32",
        help="of this project; results in bf16 are not compared (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-baseline", action="store_true", help="if it takes too long")
    arguments = parser.parse_args()
    args = (arguments.proxies, arguments.banks, arguments.dim)
    ours_args = (*args, arguments.memory_dtype)
    small = (64, 2, 16)
    ours = measure(steps, make_ready, *ours_args, warm_up=small, floor=least)
    found = ours.result
    baseline, agrees = None, None
    if not arguments.no_baseline:
        plain = measure(plain_step, make_problem, *args, warm_up=small)
        baseline = plain.seconds, plain.extra_mb
        loss = plain.result[0]
        agrees = (
            None
            if ours_args[3] == "bf16"
            else abs(found[0] - loss) < 1e-5 * loss
            and all(
                bool(np.abs(one - other).max() < 1e-6)
                for one, other in zip(found[1:], plain.result[1:], strict=True)
            )
        )
    report(
        "losses",
        f"batch {BATCH}, {args[0]:,} proxies x {args[1]} banks x {args[2]}, {ours_args[3]}",
        (ours.seconds / STEPS, ours.extra_mb), baseline, agrees, ours.floor, steps=STEPS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
