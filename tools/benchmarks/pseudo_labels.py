#!/usr/bin/env python
"""Times clustering, features to DBSCAN labels, against a plain dense implementation."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from measure import measure, report
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from reid.neighbors import TIE_TOLERANCE, dbscan, jaccard_distance

K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.5, 4


def make_features(count: int, dim: int) -> Tensor:
    """Unit features with about 31 images per identity, as in MSMT17."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(count // 31, 2), dim, generator=generator)
    features = torch.empty(count, dim)
    for start in range(0, count, 65536):
        part = features[start : start + 65536]
        identity = torch.randint(len(centres), (len(part),), generator=generator)
        noise = torch.randn(len(part), dim, generator=generator)
        part.copy_(F.normalize(centres[identity] + 1.6 * noise, dim=1))
    return features


def sparse_labels(features: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """This project's side: the steps of `JaccardDBSCAN`."""
    distances = jaccard_distance(features, K1, K2, max_distance=EPS + 1e-5)
    return dbscan(distances, EPS, MIN_SAMPLES)


def dense_labels(features: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The same definition as in the field's code, with dense V and dense distances."""
    count = len(features)
    distance = (2 - 2 * features @ features.T).numpy()
    np.fill_diagonal(distance, -1)
    nearest = np.empty((count, K1), np.int64)
    for start in range(0, count, 1024):
        part = torch.from_numpy(distance[start : start + 1024])
        nearest[start : start + 1024] = part.topk(K1, largest=False).indices.numpy()
    np.fill_diagonal(distance, 0)
    half = round(K1 / 2) + 1

    def reciprocal(i: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        forward = nearest[i, :length]
        return forward[(nearest[forward, :length] == i).any(1)]

    full = [reciprocal(i, K1) for i in range(count)]
    halves = [reciprocal(i, half) for i in range(count)]
    v = np.zeros((count, count), np.float32)
    for i in range(count):
        members = full[i]
        for c in full[i]:
            if len(np.intersect1d(halves[c], full[i])) > 2 / 3 * len(halves[c]):
                members = np.append(members, halves[c])
        members = np.unique(members)
        weights = np.exp(-distance[i, members])
        v[i, members] = weights / weights.sum()
    del distance
    expanded = np.empty_like(v)
    for i in range(count):
        expanded[i] = v[nearest[i, :K2]].mean(0)
    v = expanded
    del expanded
    inverted = [np.flatnonzero(v[:, c]) for c in range(count)]
    jaccard = np.empty((count, count), np.float32)
    for i in range(count):
        shared = np.zeros(count, np.float32)
        for c in np.flatnonzero(v[i]):
            rows = inverted[c]
            shared[rows] += np.minimum(v[i, c], v[rows, c])
        jaccard[i] = 1 - shared / (2 - shared)
    del v
    np.maximum(jaccard, 0, out=jaccard)
    clusterer = DBSCAN(
        eps=EPS + TIE_TOLERANCE, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=-1
    )
    return clusterer.fit_predict(jaccard)


def main() -> None:
    """Parses the arguments, measures both sides, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32_621, help="N (default: MSMT17's 32,621)")
    parser.add_argument("--dim", type=int, default=384, help="D (default: %(default)s)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device of this project"
    )
    parser.add_argument("--no-baseline", action="store_true", help="if it does not fit")
    arguments = parser.parse_args()
    args = (arguments.images, arguments.dim)
    seconds, extra, gpu_mb, labels, *_ = measure(
        sparse_labels, make_features, *args, warm_up=(5000, args[1]), device=arguments.device
    )
    baseline, agrees = None, None
    if not arguments.no_baseline:
        *baseline, _, dense = measure(dense_labels, make_features, *args, warm_up=(200, args[1]))[
            :4
        ]
        agrees = bool(adjusted_rand_score(dense, labels) > 0.9999)
    report(
        "pseudo-labels", f"{args[0]:,} x {args[1]}", (seconds, extra), baseline, agrees,
        clusters=int(labels.max()) + 1, outliers=int((labels < 0).sum()),
        device=arguments.device, extra_gpu_mb=gpu_mb,
    )  # fmt: skip


if __name__ == "__main__":
    main()
