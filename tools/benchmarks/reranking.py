#!/usr/bin/env python
"""Times k-reciprocal re-ranking against a plain dense implementation."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from measure import measure, report
from ranking import SIZES, Problem, feature_sets, make_problem

from reid.evaluation.ranking import rank_distances
from reid.evaluation.reranking import rerank

K1, K2, LAMBDA = 20, 6, 0.3


def make_small_problem(size: str, dim: int, queries: int, gallery: int) -> Problem:
    """The first queries and gallery images of a problem."""
    problem = make_problem(size, dim)
    return {
        name: value[: queries if name.startswith("query") else gallery]
        for name, value in problem.items()
    }


def product(problem: Problem) -> float:
    """The mAP after re-ranking."""
    blocks = rerank(
        problem["query_feat"], problem["gallery_feat"], k1=K1, k2=K2, lambda_value=LAMBDA
    )
    return rank_distances(blocks, *feature_sets(problem)).mAP


def baseline(problem: Problem) -> float:
    """The same as in the published code: every matrix is (Q + G) x (Q + G)."""
    num_query = len(problem["query_feat"])
    both = torch.cat((problem["query_feat"], problem["gallery_feat"]))
    original = (2 - 2 * both @ both.T).clamp_(min=0).square_().numpy()
    original = (original / original.max(0)).T
    count = len(original)
    nearest = np.argsort(original, axis=1)[:, : K1 + 1]
    half = round(K1 / 2) + 1

    def reciprocal(i: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        forward = nearest[i, :length]
        return forward[(nearest[forward, :length] == i).any(1)]

    v = np.zeros((count, count), np.float32)
    for i in range(count):
        own = reciprocal(i, K1 + 1)
        members = own
        for c in own:
            theirs = reciprocal(c, half)
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        weights = np.exp(-original[i, members])
        v[i, members] = weights / weights.sum()
    original = original[:num_query]
    expanded = np.empty_like(v)
    for i in range(count):
        expanded[i] = v[nearest[i, :K2]].mean(0)
    v = expanded
    inverted = [np.flatnonzero(v[:, c]) for c in range(count)]
    final = np.empty((num_query, count), np.float32)
    for i in range(num_query):
        shared = np.zeros(count, np.float32)
        for c in np.flatnonzero(v[i]):
            shared[inverted[c]] += np.minimum(v[i, c], v[inverted[c], c])
        final[i] = (1 - LAMBDA) * (1 - shared / (2 - shared)) + LAMBDA * original[i]
    return rank_distances([(0, final[:, num_query:])], *feature_sets(problem)).mAP


def main() -> None:
    """Parses the arguments, measures both sides, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="market1501")
    parser.add_argument("--dim", type=int, default=384, help="D (default: %(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="if it does not fit")
    arguments = parser.parse_args()
    query, gallery, *_ = SIZES[arguments.size]
    args = (arguments.size, arguments.dim, query, gallery)
    small = (arguments.size, arguments.dim, 100, 400)
    seconds, extra, _, ours, *_ = measure(product, make_small_problem, *args, warm_up=small)
    other, agrees = None, None
    if not arguments.no_baseline:
        *other, _, theirs = measure(baseline, make_small_problem, *args, warm_up=small)[:4]
        agrees = abs(ours - theirs) < 1e-5
    report(
        "re-ranking", f"{arguments.size} ({query:,} x {gallery:,} x {arguments.dim})",
        (seconds, extra), other, agrees, mAP=ours,
    )  # fmt: skip


if __name__ == "__main__":
    main()
