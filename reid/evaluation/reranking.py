"""k-reciprocal re-ranking of a gallery for each query, and query expansion."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation.distances import comparable_features
from reid.neighbors import (
    by_columns,
    encode_neighbors,
    farthest_distances,
    half_length,
    jaccard_memory_mb,
    jaccard_of_rows,
    log_memory,
    nearest_neighbors,
)
from reid.structures import ProgressBar, part_of_progress

_BLOCK_BYTES = 64 * 2**20


def rerank(
    query_feat: Tensor,
    gallery_feat: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    progress: ProgressBar | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Re-ranked distances of queries to a gallery, computed block by block of queries.

    Zhong et al., *Re-ranking Person Re-identification with k-reciprocal Encoding* (CVPR 2017), as
    their published code computes it: over queries and gallery together, d is the square of the
    squared Euclidean distance, divided by the largest of its row; lists have k1 + 1 entries, the
    image itself included. Result: (1 - lambda) * Jaccard distance + lambda * d.

    Args:
        query_feat: (Q, D) features of unit length.
        gallery_feat: (G, D) features of unit length, on the same device; G > 0.
        k1: Length of the neighbour lists without the image itself.
        k2: Rows averaged in the local query expansion.
        lambda_value: Weight of d; 1 keeps the original order.
        progress: Called with (queries' worth of work done, Q).

    Returns:
        Pairs (start, distances (b, G)): the distances of the queries from `start` on.

    Raises:
        ValueError: An argument is out of its range or has a wrong shape, or a feature is not
            finite.
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise ValueError(
            "expected k1 and k2 of 1 or more and lambda from 0 to 1, got "
            f"{k1}, {k2}, {lambda_value}"
        )
    query_feat, gallery_feat = comparable_features(query_feat, gallery_feat)
    if not len(gallery_feat):
        raise ValueError("gallery_feat: expected one image or more, got none")
    return _rerank(query_feat, gallery_feat, k1, k2, lambda_value, progress)


def _rerank(
    query_feat: Tensor,
    gallery_feat: Tensor,
    k1: int,
    k2: int,
    lambda_value: float,
    progress: ProgressBar | None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    num_queries, count = len(query_feat), len(query_feat) + len(gallery_feat)
    log_memory("Re-ranking", count, _memory_mb(count, query_feat.shape[1], k1, k2))
    both = torch.cat((query_feat, gallery_feat)).float().cpu()
    length = min(k1 + 1, count)
    # shares of the time as measured at MSMT17's size
    searching, measuring, ranking = (
        part_of_progress(progress, num_queries, *part) for part in ((0, 0.4), (0.4, 0.7), (0.7, 1))
    )
    neighbors = nearest_neighbors(both, min(max(k1 + 1, k2), count), progress=searching)
    farthest = farthest_distances(both, progress=measuring)
    encoding = encode_neighbors(
        both.numpy(), neighbors, length, half_length(k1, count), k2, farthest
    )
    queries = encoding[:num_queries]
    gallery = by_columns(encoding[num_queries:])  # convert once, not for every block
    squared_norms = both.square().sum(1)
    rows = max(1, _BLOCK_BYTES // (4 * max(len(gallery_feat), 1)))
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        block = both[start:stop]
        distances = torch.addmm(squared_norms[num_queries:], block, both[num_queries:].T, alpha=-2)
        distances += squared_norms[start:stop, None]
        largest = torch.from_numpy(farthest[start:stop, None])
        distances.clamp_(min=0).div_(largest.clamp(min=1e-12)).square_()
        result = distances.mul_(lambda_value).add_(1 - lambda_value).numpy()
        jaccard = jaccard_of_rows(queries[start:stop], gallery)
        which = np.repeat(np.arange(stop - start), np.diff(jaccard.indptr))
        result[which, jaccard.indices] += (1 - lambda_value) * (jaccard.data - 1)
        if ranking is not None:
            ranking(stop, num_queries)
        yield start, result


def _memory_mb(count: int, dim: int, k1: int, k2: int) -> float:
    """About how many MB it takes: features, Jaccard distances, and blocks with their indices."""
    blocks = 4 * _BLOCK_BYTES
    return jaccard_memory_mb(count, dim, k1 + 1, k2) + (4 * count * dim + blocks) / 2**20


def expand_queries(query_feat: Tensor, gallery_feat: Tensor, k: int, alpha: float = 0.0) -> Tensor:
    """Queries averaged with their nearest gallery images.

    With alpha 0, average query expansion (Chum et al., ICCV 2007); above, alpha-weighted expansion
    (Radenovic et al., *Fine-tuning CNN Image Retrieval*, TPAMI 2019): the weight of a gallery image
    is its cosine similarity to the query, at least 0, to the power alpha. The query weighs 1.

    Args:
        query_feat: (Q, D) features of unit length.
        gallery_feat: (G, D) features of unit length, on the same device.
        k: Gallery images in each mean, at most G.
        alpha: Exponent, 0 or more.

    Returns:
        (Q, D) features of unit length.

    Raises:
        ValueError: An argument is out of its range or has a wrong shape, or a feature is not
            finite.
    """
    query_feat, gallery_feat = comparable_features(query_feat, gallery_feat)
    if not 1 <= k <= len(gallery_feat):
        raise ValueError(f"k: expected 1 to the gallery's {len(gallery_feat)} images, got {k}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected 0 or more, got {alpha}")
    expanded = torch.empty_like(query_feat, dtype=torch.float32)
    rows = max(1, _BLOCK_BYTES // (4 * len(gallery_feat)))
    for start in range(0, len(query_feat), rows):
        queries = query_feat[start : start + rows].float()
        similarity, nearest = (queries @ gallery_feat.float().T).topk(k, 1)
        weights = similarity.clamp(min=0).pow(alpha)
        total = queries + (weights[:, None] @ gallery_feat[nearest].float())[:, 0]
        expanded[start : start + rows] = F.normalize(total, dim=1)
    return expanded
