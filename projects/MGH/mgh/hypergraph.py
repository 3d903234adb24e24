"""MGH's label correction: labels spread over a hypergraph of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from reid.evaluation.time_histograms import Doubles
from reid.neighbors import Labels, row_blocks, smallest_of_rows
from reid.projects.mgh.distance import Rows, mean_to_groups

_BLOCK_BYTES = 64 * 2**20
_SHARPNESS = 0.05  # of the softmax over classes
_NUM_SEEDS = 4


@dataclass(frozen=True)
class Spreading:
    """The numbers of MGH's two propagations (`Correct and Smooth`, Huang et al., ICLR 2021).

    Attributes:
        alpha: Share of the neighbours in a step, for errors and for labels.
        scale: Factor of the spread errors.
        steps: Steps of each.
    """

    alpha: tuple[float, float] = (0.99, 0.9)
    scale: float = 20.0
    steps: int = 50


def incidence(
    rows: Rows, groupings: Sequence[Labels], neighbors: Sequence[int]
) -> scipy.sparse.csr_matrix:
    """The hypergraph's incidence matrix H: which images are how much in which edge.

    For each k in `neighbors` and each image i, an edge of the image and its k nearest by row i:
    H[j, e] = exp(-(d_ij / b)^2), where b is the mean of all d. If the image is not among its own
    k + 1 nearest, it takes the place of the last one, with H = 1. Then for each grouping an edge
    per group: H[i, e] = exp(-(mean of d_ij over the group's images / b)^2), and each image without
    a group (-1) is an edge of its own.

    Args:
        rows: Distances d of N images.
        groupings: (N,) each, groups from 0.
        neighbors: At most N - 1 each.

    Returns:
        (N, E) double precision: at 32,621 images and five lists, 0.1 GB.
    """
    count = len(groupings[0])
    lists = np.empty((count, max(neighbors) + 1), np.int32)
    near = np.empty(lists.shape)
    whole = [_with_single_groups(group) for group in groupings]
    means = np.empty((len(whole), count))
    total = 0.0
    for start, stop in row_blocks(count):
        block = rows(np.arange(start, stop))
        total += block.sum()
        smallest_of_rows(block, lists[start:stop])
        near[start:stop] = np.take_along_axis(block, lists[start:stop].astype(np.int64), 1)
        for group, mean in zip(whole, means, strict=True):
            same = group[start:stop, None] == group
            mean[start:stop] = np.where(same, block, 0).sum(1) / same.sum(1)
    scale = total / count**2 or 1.0
    near = np.exp(-((near / scale) ** 2))  # once for all lists: `Graph` takes their differences
    everyone = np.arange(count)
    parts = []
    for k in neighbors:
        members, weights = lists[:, : k + 1].copy(), near[:, : k + 1].copy()
        alone = ~(members == everyone[:, None]).any(1)
        members[alone, -1], weights[alone, -1] = everyone[alone], 1
        edges = np.repeat(everyone, k + 1)
        parts.append(_matrix(weights.ravel(), members.ravel(), edges, (count, count)))
    for group, mean in zip(whole, means, strict=True):
        weights = np.exp(-((mean / scale) ** 2))
        parts.append(_matrix(weights, everyone, group, (count, int(group.max()) + 1)))
    return scipy.sparse.hstack(parts, format="csr")


@dataclass(frozen=True)
class Graph:
    """A = H H^T as its factors; its entries never exist.

    An image's neighbour lists contain each other, so their edges are stored as differences: R_1 =
    H_1, R_k = H_k - H_{k-1}, which holds only what list k adds. H_k x is the sum of the first k
    R x, so A x takes two products with R and two sums over the lists. With the published five lists
    R has 91 entries for each image, H 255.

    Attributes:
        rings: (N, E) sparse R on the device that multiplies it.
        transposed: (E, N) sparse.
        degree: (N,) row sums of A.
        lists: Neighbour lists of each image.
    """

    rings: Tensor
    transposed: Tensor
    degree: Tensor
    lists: int

    @classmethod
    def of(cls, incidence: scipy.sparse.csr_matrix, device: torch.device, lists: int = 0) -> Graph:
        """The graph of an incidence matrix.

        Args:
            incidence: (N, E); the first `lists` * N edges are the images' neighbour lists, list by
                list.
            device: That multiplies it.
            lists: How many; 0 is right for any matrix.
        """
        count = incidence.shape[0]
        degree = incidence @ (incidence.T @ np.ones(count))
        edges = [incidence[:, k * count : (k + 1) * count] for k in range(lists)]
        parts = [edges[k] - edges[k - 1] if k else edges[k] for k in range(lists)]
        rings = scipy.sparse.hstack([*parts, incidence[:, lists * count :]], format="csr")
        rings.eliminate_zeros()
        return cls(
            _tensor(rings).to(device),
            _tensor(rings.T).to(device),
            torch.from_numpy(degree).to(device),
            lists,
        )

    def symmetric(self, values: Tensor) -> Tensor:
        """D^-1/2 A D^-1/2 times values (N, b)."""
        root = self.degree.rsqrt()[:, None]
        return root * self._times(root * values)

    def random_walk(self, values: Tensor) -> Tensor:
        """D^-1 A times values (N, b); the rows of D^-1 A sum to 1."""
        return self._times(values) / self.degree[:, None]

    def _times(self, values: Tensor) -> Tensor:
        edges = torch.sparse.mm(self.transposed, values)
        if self.lists:
            of_lists = edges[: self.lists * len(values)].view(self.lists, *values.shape)
            for k in range(1, self.lists):
                of_lists[k] += of_lists[k - 1]
            for k in range(self.lists - 2, -1, -1):
                of_lists[k] += of_lists[k + 1]
        result: Tensor = torch.sparse.mm(self.rings, edges)
        return result


def find_seeds(rows: Rows, cluster: Labels) -> tuple[Labels, Doubles]:
    """For each class the 4 images that are closest to it, whatever their label.

    The likeness of an image i to a class is 1 - the mean over the class's images j of d(j, i).

    Args:
        rows: Distances d of N images.
        cluster: (N,) classes from 0 without gaps, -1 = outlier.

    Returns:
        (N,) the class that an image is a seed of, the last one if it is of several, -1 = none; and
        (N,) the sum over classes of exp(likeness / 0.05).
    """
    seeds, total = np.full(len(cluster), -1), np.zeros(len(cluster))
    for first, last in _class_blocks(cluster, len(cluster)):
        likeness = 1 - mean_to_groups(rows, cluster, first, last)
        best = np.empty((last - first, min(_NUM_SEEDS, len(cluster))), np.int32)
        smallest_of_rows(-likeness, best)
        for number, images in enumerate(best):
            seeds[images] = first + number
        total += np.exp(likeness / _SHARPNESS).sum(0)
    return seeds, total


def correct_labels(
    rows: Rows,
    cluster: Labels,
    graph: Graph,
    spreading: Spreading,
) -> Labels:
    """New classes (N,) of all images; those without a class (-1) keep none.

    MGH, section 3.3: the errors of the softmax at the seeds are spread (symmetric A), added to the
    softmax, and the result is spread again (random walk). A seed keeps its class as one-hot values
    through all steps of the first; of equal values the first class wins. Classes do not influence
    each other, so it goes block by block of classes: at 32,621 images with 6,000 clusters a block
    takes 0.2 GB.

    Args:
        rows: Distances d of N images.
        cluster: (N,) classes from 0 without gaps, -1 = outlier.
        graph: The hypergraph.
        spreading: Numbers of the two propagations.
    """
    count = len(cluster)
    seeds, total = find_seeds(rows, cluster)
    best, label = np.full(count, -np.inf), np.full(count, -1)
    for first, last in _class_blocks(cluster, graph.rings.shape[1]):
        likeness = 1 - mean_to_groups(rows, cluster, first, last)
        prediction = torch.from_numpy(np.exp(likeness / _SHARPNESS) / total).to(graph.degree.device)
        values = spread(graph, prediction.T, torch.from_numpy(seeds), first, spreading).cpu()
        score = values.numpy()
        block = score.argmax(1)
        highest = score[np.arange(count), block]
        better = highest > best
        best[better], label[better] = highest[better], first + block[better]
    label[cluster == -1] = -1
    return label


def spread(
    graph: Graph, prediction: Tensor, seeds: Tensor, first: int, spreading: Spreading
) -> Tensor:
    """The values (N, b) of the classes from `first` on, after both propagations.

    Args:
        graph: The hypergraph.
        prediction: (N, b) softmax over all classes, of these classes.
        seeds: (N,) see `find_seeds`.
        first: Number of the first of these classes.
        spreading: Numbers of the two propagations.
    """
    (keep, smooth), device = spreading.alpha, prediction.device
    seeds = seeds.to(device)
    is_seed = (seeds >= 0)[:, None]
    classes = torch.arange(first, first + prediction.shape[1], device=device)
    target = (seeds[:, None] == classes).to(prediction.dtype)
    error = torch.where(is_seed, target - prediction, 0)
    values = error
    for _ in range(spreading.steps):
        values = keep * graph.symmetric(values) + (1 - keep) * error
        values = torch.where(is_seed, target, values)
    start = torch.where(is_seed, target, prediction + spreading.scale * values)
    values = start
    for _ in range(spreading.steps):
        values = (smooth * graph.random_walk(values) + (1 - smooth) * start).clamp(0, 1)
    return values


def _class_blocks(cluster: Labels, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of classes, so that `width` doubles for each class of a range take about 64 MB."""
    classes = int(cluster.max()) + 1
    step = max(1, _BLOCK_BYTES // (8 * max(width, 1)))
    for first in range(0, classes, step):
        yield first, min(first + step, classes)


def _with_single_groups(group: Labels) -> Labels:
    """The groups, with each image that has none as a further group."""
    result: Labels = group.copy()
    alone = group == -1
    first = int(group.max(initial=-1)) + 1
    result[alone] = np.arange(first, first + alone.sum())
    return result


def _matrix(
    data: Doubles, row: Labels, column: Labels, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((data, (row, column)), shape=shape)


def _tensor(matrix: scipy.sparse.spmatrix) -> Tensor:
    entries = matrix.tocoo()
    place = torch.from_numpy(np.stack((entries.row, entries.col)).astype(np.int64))
    return torch.sparse_coo_tensor(
        place, torch.from_numpy(entries.data), entries.shape, check_invariants=False
    ).coalesce()
