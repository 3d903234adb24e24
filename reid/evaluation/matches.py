"""Helps a user to judge clusters without labels: confidences, and likely matches."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation.ranking import top_matches
from reid.files import write_text
from reid.structures import OUTLIER, UNKNOWN_CAMERA, FeatureSet, ImageRecord

_BLOCK = 4096


class Match(NamedTuple):
    """Two images of different cameras that look like the same person.

    Attributes:
        first: Index of the image with the smaller index.
        second: Index of the other.
        similarity: Cosine of their features, -1 to 1.
    """

    first: int
    second: int
    similarity: float


def cluster_confidence(features: Tensor, cluster: Tensor) -> Tensor:
    """How clearly each image belongs to its cluster and not to the nearest other cluster.

    The simplified silhouette (Hruschka et al., *Evolutionary Algorithms for Clustering Gene
    Expression Data*, ICDM 2004), with means in place of members so that no pair of images is
    compared: (b - a) / max(a, b), a and b the cosine distances to the mean of the image's cluster,
    the image itself left out, and to the nearest mean of another one; negative values become 0.

    Args:
        features: (N, D) of unit length.
        cluster: (N,) clusters; -1 = outlier.

    Returns:
        (N,) from 0 (another cluster is as near) to 1. 0 for outliers and for clusters of one image;
        1 for all others if there is only one cluster.
    """
    confidence = torch.zeros(len(cluster))
    features, cluster = features.detach().float().cpu(), cluster.cpu()
    kept = (cluster != OUTLIER).nonzero()[:, 0]
    if not len(kept):
        return confidence
    dense = torch.unique(cluster[kept], return_inverse=True)[1]
    sizes = torch.bincount(dense)
    sums = torch.zeros(len(sizes), features.shape[1]).index_add_(0, dense, features[kept])
    means = F.normalize(sums, dim=1)
    for start in range(0, len(kept), _BLOCK):
        rows, own = kept[start : start + _BLOCK], dense[start : start + _BLOCK]
        feature = features[rows]
        others = 1 - feature @ means.T
        others.scatter_(1, own[:, None], torch.inf)
        nearest = others.amin(1).clamp(min=0)
        rest = F.normalize(sums[own] - feature, dim=1)
        distance = (1 - (feature * rest).sum(1)).clamp(min=0)
        if len(sizes) == 1:
            value = torch.ones(len(rows))
        else:
            larger = torch.maximum(distance, nearest)
            value = torch.where(larger > 0, (nearest - distance) / larger, 0.0).clamp(0, 1)
        confidence[rows] = torch.where(sizes[own] > 1, value, 0.0)
    return confidence


def cross_camera_matches(features: FeatureSet, most: int) -> list[Match]:
    """Pairs of images that are each other's nearest image of another known camera.

    A wrong pair among the most similar ones shows cameras or clothes that mislead the model. No
    image is in two pairs.

    Args:
        features: Unit features of N images; unreadable images are in no pair.
        most: The largest number of pairs.

    Returns:
        The most similar first.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most: expected 1 or more, got {most}")
    known = (features.present & (features.camids != UNKNOWN_CAMERA)).nonzero()[:, 0]
    chosen = features[known]
    if len(torch.unique(chosen.camids)) < 2:
        return []
    # With one identity for all, the protocol skips images of the same camera.
    chosen = replace(chosen, pids=torch.zeros_like(chosen.pids))
    feature = chosen.test
    nearest = top_matches(chosen, chosen, k=1)[:, 0]
    everyone = np.arange(len(nearest))
    first = everyone[(nearest[nearest] == everyone) & (everyone < nearest)]
    second = nearest[first]
    pairs = torch.from_numpy(np.stack((first, second))).to(feature.device)
    similarity = (feature[pairs[0]] * feature[pairs[1]]).sum(1)
    best = torch.argsort(similarity, descending=True, stable=True)[:most]
    rows = known[pairs[:, best]].tolist()
    return [Match(*row) for row in zip(*rows, similarity[best].tolist(), strict=True)]


def camera_name(record: ImageRecord) -> str:
    """The camera's name if its dataset has one, else its number; empty if unknown."""
    name = record.extra.get("camera")
    return name or ("" if record.camid == UNKNOWN_CAMERA else str(record.camid))


def write_clusters(
    path: Path, records: Sequence[ImageRecord], cluster: Tensor, confidence: Tensor
) -> None:
    """Writes a CSV file of `path,cluster,camera,confidence`, clusters together, surest first.

    Outliers come last, as cluster -1. See `cluster_confidence` and `camera_name`.
    """
    last = int(cluster.max()) + 1 if len(cluster) else 0
    numbers = torch.where(cluster == OUTLIER, last, cluster)
    by_confidence = torch.argsort(confidence, descending=True, stable=True)
    order = by_confidence[torch.argsort(numbers[by_confidence], stable=True)]
    rows = [
        (
            records[i].path,
            int(cluster[i]),
            camera_name(records[i]),
            f"{float(confidence[i]):.4f}" if cluster[i] != OUTLIER else "",
        )
        for i in order.tolist()
    ]
    _write_csv(path, ("path", "cluster", "camera", "confidence"), rows)


def write_matches(
    path: Path, records: Sequence[ImageRecord], matches: Sequence[Match], cluster: Tensor
) -> None:
    """Writes a CSV file of two paths, two cameras, their similarity, and the common cluster.

    `cluster` is empty if the two are in different clusters or in none.
    """
    rows = []
    for first, second, similarity in matches:
        number = int(cluster[first])
        common = number if number == int(cluster[second]) and number != OUTLIER else ""
        one, other = records[first], records[second]
        rows.append(
            (
                one.path,
                other.path,
                camera_name(one),
                camera_name(other),
                f"{similarity:.4f}",
                common,
            )
        )
    _write_csv(
        path, ("path", "other_path", "camera", "other_camera", "similarity", "cluster"), rows
    )


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
