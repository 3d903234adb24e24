#!/usr/bin/env python
"""Times evaluation, features to mAP and CMC, against sorting query by query."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from measure import measure, report
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation.ranking import rank
from reid.structures import FeatureSet

SIZES = {"market1501": (3_368, 15_913, 750, 6), "msmt17": (11_659, 82_161, 3_060, 15)}
Problem = dict[str, Tensor]


def make_problem(size: str, dim: int, limit: int | None = None) -> Problem:
    """Unit features of query and gallery with identities and cameras."""
    num_query, num_gallery, num_pids, num_cameras = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_pids, dim, generator=generator)
    problem: Problem = {}
    for split, count in (("query", num_query), ("gallery", num_gallery)):
        pids = torch.randint(num_pids, (count,), generator=generator)
        noise = 2.5 * torch.randn(count, dim, generator=generator)
        problem[f"{split}_feat"] = F.normalize(noise.add_(centres[pids]), dim=1)
        problem[f"{split}_pids"] = pids
        problem[f"{split}_camids"] = torch.randint(num_cameras, (count,), generator=generator)
    if limit is not None:
        for name in ("query_feat", "query_pids", "query_camids"):
            problem[name] = problem[name][:limit]
    return problem


def feature_sets(problem: Problem) -> tuple[FeatureSet, FeatureSet]:
    """Query and gallery as feature sets of this project."""
    query, gallery = (
        FeatureSet.of(*(problem[f"{split}_{name}"] for name in ("feat", "pids", "camids")))
        for split in ("query", "gallery")
    )
    return query, gallery


def product(problem: Problem) -> tuple[float, float, Any]:
    """mAP, Rank-1 and the AP of each query, by this project."""
    result = rank(*feature_sets(problem)).ranking
    return result.mAP, result.rank(1), result.average_precision


def baseline(problem: Problem) -> tuple[float, float, Any]:
    """The same numbers with numpy and scikit-learn, query by query, from all distances."""
    distance = torch.cdist(problem["query_feat"], problem["gallery_feat"]).numpy()
    ids = {name: value.numpy() for name, value in problem.items() if not name.endswith("feat")}
    aps, first = [], []
    for i, row in enumerate(distance):
        order = np.argsort(row)
        same = ids["gallery_pids"][order] == ids["query_pids"][i]
        removed = same & (ids["gallery_camids"][order] == ids["query_camids"][i])
        match = same[~removed]
        if not match.any():
            continue
        first.append(int(match.argmax()))
        aps.append(average_precision_score(match, -row[order][~removed]))
    return float(np.mean(aps)), float(np.mean(np.array(first) == 0)), None


def brute_force(problem: Problem) -> tuple[float, float, Any]:
    """The same numbers in double precision."""
    problem = {
        name: value.double() if name.endswith("feat") else value for name, value in problem.items()
    }
    return baseline(problem)


def main() -> None:
    """Parses the arguments, measures both sides, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="market1501")
    parser.add_argument("--dim", type=int, default=384, help="D (default: %(default)s)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device of this project"
    )
    parser.add_argument("--no-baseline", action="store_true", help="if it does not fit")
    arguments = parser.parse_args()
    args, small = (arguments.size, arguments.dim), (arguments.size, arguments.dim, 50)
    seconds, extra, gpu_mb, ours, *_ = measure(
        product, make_problem, *args, warm_up=small, device=arguments.device
    )
    other, agrees = None, None
    if not arguments.no_baseline:
        *other, _, theirs = measure(baseline, make_problem, *args, warm_up=small)[:4]
        agrees = abs(ours[0] - theirs[0]) < 1e-5 and abs(ours[1] - theirs[1]) < 1e-5
    checked = (*args, 2000)
    exact = measure(brute_force, make_problem, *checked).result[0]
    found = measure(product, make_problem, *checked, device=arguments.device).result[0]
    error = abs(found - exact)
    query, gallery, *_ = SIZES[args[0]]
    report(
        "ranking", f"{args[0]} ({query:,} x {gallery:,} x {args[1]})", (seconds, extra), other,
        agrees, mAP=ours[0], mAP_error_on_2000_queries=error,
        device=arguments.device, extra_gpu_mb=gpu_mb,
    )  # fmt: skip


if __name__ == "__main__":
    main()
