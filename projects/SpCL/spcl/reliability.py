"""The self-paced test: which images of a cluster are reliable, and which become labels of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """The result of the self-paced test.

    Attributes:
        label: (N,) the labels of the images. Labels that lost all images leave gaps.
        image_compactness: (N,) 1 - |C & C_tight| / |C or C_tight|; small is good.
        image_independence: (N,) 1 - |C & C_loose| / |C or C_loose|; small is good.
        label_compactness: (L,) the smallest of each label's images.
        label_independence: (L,) the smallest of each label's images.
        threshold: theta; None: no label has more than one image yet.
    """

    label: Tensor
    image_compactness: Tensor
    image_independence: Tensor
    label_compactness: Tensor
    label_independence: Tensor
    threshold: float | None


def self_paced_labels(
    label: Tensor, tight: Tensor, loose: Tensor, threshold: float | None = None
) -> Reliability:
    """Tests the labels of one clustering by a tighter and a looser one (SpCL, section 3.3).

    An image keeps its label k if indep_k <= theta, and if its comp is the smallest of the label.
    All others become labels of one image, numbered after the old labels in the order of images.

    The sizes of sets are counted from pairs of labels, so this takes a few arrays of N numbers.

    Args:
        label: (N,) labels from 0 without gaps; each un-clustered image has a label of its own.
        tight: (N,) the same of a clustering with a smaller eps.
        loose: (N,) the same of a clustering with a larger eps.
        threshold: theta of an earlier epoch. None: it is the entry min(n - 1, round(0.9 n)) of the
            sorted indep of the n labels with more than one image; if there is no such label, every
            label passes.
    """
    size = torch.bincount(label)
    compactness = _set_distance(label, tight)
    independence = _set_distance(label, loose)
    least_compact = _smallest(compactness, label, len(size))
    least_independent = _smallest(independence, label, len(size))
    if threshold is None:
        several = least_independent[size > 1].sort().values
        if count := len(several):
            threshold = float(several[min(count - 1, round(0.9 * count))])
    lost = compactness > least_compact[label]
    if threshold is not None:
        lost |= (least_independent > threshold)[label]
    final = label.clone()
    final[lost] = torch.arange(len(size), len(size) + int(lost.sum()))
    return Reliability(
        final, compactness, independence, least_compact, least_independent, threshold
    )


def _smallest(value: Tensor, label: Tensor, count: int) -> Tensor:
    """The smallest value (count,) among the images of each label."""
    largest = value.new_full((count,), torch.inf)
    return largest.scatter_reduce(0, label, value, "amin")


def _set_distance(one: Tensor, other: Tensor) -> Tensor:
    """1 - |A & B| / |A or B| (N,) of each image's label sets A and B in two clusterings (N,)."""
    pair = one * (int(other.max()) + 1) + other
    _, place, together = torch.unique(pair, return_inverse=True, return_counts=True)
    common = together[place]
    sizes = torch.bincount(one)[one] + torch.bincount(other)[other]
    distance: Tensor = 1 - common.double() / (sizes - common)
    return distance
