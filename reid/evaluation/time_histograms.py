"""How long persons take from one camera to another: spatial-temporal histograms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import njit
from scipy.ndimage import correlate1d

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_NONE = 1e-7  # added to every divisor, as published


@dataclass(frozen=True)
class TimeHistograms:
    """For each pair of cameras, how the times between sightings of one person are spread.

    Attributes:
        cameras: (C,) the known cameras, ascending.
        table: (C, C, bins) counts or shares, rows [later camera, earlier camera], by place in
            `cameras`. Bin k holds times from k * width to below (k + 1) * width.
        width: Frames in a bin.
    """

    cameras: Integers
    table: Doubles
    width: int

    def normalised(self) -> TimeHistograms:
        """Each row divided by (its sum + 1e-7): shares, or zeros where nothing was seen."""
        table = self.table / (self.table.sum(2, keepdims=True) + _NONE)
        return TimeHistograms(self.cameras, table, self.width)

    def smoothed(self, sigma: float) -> TimeHistograms:
        """Each row blurred by a normal kernel, then `normalised`.

        The kernel ends after 3 sigma, and is not made larger at the ends of a row.

        Args:
            sigma: Standard deviation in bins.
        """
        reach = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
        kernel = np.exp(-(reach**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
        table = correlate1d(self.table, kernel, axis=2, mode="constant")
        return TimeHistograms(self.cameras, table, self.width).normalised()

    def shares(
        self, camids: Integers, frames: Integers, other_camids: Integers, other_frames: Integers
    ) -> Doubles:
        """The table's entries for all pairs of some images with others.

        For an image that comes later than the other one, the row [its camera, the other's camera];
        else [the other's camera, its camera]. 0 where a camera is not known to the table or the
        time is beyond the last bin.

        Args:
            camids: (n,) cameras of the images.
            frames: (n,) their frames; must be known.
            other_camids: (m,).
            other_frames: (m,).

        Returns:
            (n, m).
        """
        result = np.zeros((len(camids), len(other_camids)))
        places = (_places(self.cameras, given) for given in (camids, other_camids))
        first, second = places
        _look_up(self.table, first, frames, second, other_frames, self.width, result)
        return result


def count_times(
    labels: Integers,
    camids: Integers,
    frames: Integers,
    *,
    num_bins: int,
    width: int = 100,
    same_camera: Literal["empty", "visits"] = "empty",
) -> TimeHistograms:
    """Counts the times between the mean frames of each person in each two cameras.

    Wang et al., *Spatial-Temporal Person Re-identification* (st-ReID, AAAI 2019): of two cameras
    that see a person, the one with the larger mean frame is the later one (of equal ones, that with
    the higher number); the entry [later, earlier, difference // width] grows by 1.

    Args:
        labels: (N,) identity or cluster of each image; -1 = left out.
        camids: (N,).
        frames: (N,) time inside the camera; on one clock for all cameras or with fixed offsets.
        num_bins: Longer times are left out (the published code of st-ReID stops there, and that of
            MGH as well).
        width: Frames in a bin.
        same_camera: [c, c]: `empty`: zeros (st-ReID). `visits`: each of the n > 1 images of a
            person in a camera adds n to the bin of its time since the first one (MGH).

    Returns:
        Counts, for the cameras of all images, labelled or not.

    Raises:
        ValueError: A frame of a labelled image is unknown, or a number is out of its range.
    """
    if num_bins < 1 or width < 1:
        raise ValueError(f"expected num_bins and width of 1 or more, got {num_bins}, {width}")
    cameras = np.unique(camids)
    labelled = labels >= 0
    if bool((frames[labelled] < 0).any()):
        raise ValueError(
            f"{int((frames[labelled] < 0).sum()):,} of {int(labelled.sum()):,} labelled images "
            "have no frame number"
        )
    place = _places(cameras, camids)[labelled]
    label, frame = labels[labelled], frames[labelled]
    order = np.lexsort((place, label))
    label, place, frame = label[order], place[order], frame[order]
    new = np.ones(len(label), np.bool_)
    new[1:] = (label[1:] != label[:-1]) | (place[1:] != place[:-1])
    group = np.cumsum(new) - 1  # an identity in a camera
    size = np.bincount(group)
    means = np.bincount(group, frame.astype(np.float64)) / (size + _NONE)
    table = np.zeros((len(cameras), len(cameras), num_bins))
    _count_pairs(label[new], place[new], means, float(width), table)
    if same_camera == "visits":
        first = np.full(len(size), np.iinfo(np.int64).max)
        np.minimum.at(first, group, frame)
        bins = (frame - first[group]) // width
        count = np.where((size[group] > 1) & (bins < num_bins), size[group], 0)
        np.add.at(table, (place, place, np.minimum(bins, num_bins - 1)), count)
    return TimeHistograms(cameras, table, width)


def joint_score(cosine: npt.NDArray[Any], share: Doubles, alpha: float = 5.0) -> Doubles:
    """Likeness by appearance and time: 1/(1 + exp(-alpha cos)) * 1/(1 + 2 exp(-alpha share)).

    st-ReID (AAAI 2019), equations 6 and 7 with their published constants: larger is more alike.

    Args:
        cosine: Cosine similarities.
        share: Of the same shape: the pairs' entries in smoothed histograms.
        alpha: Steepness of both factors.
    """
    result: Doubles = 1 / ((1 + np.exp(-alpha * cosine)) * (1 + 2 * np.exp(-alpha * share)))
    return result


def _places(cameras: Integers, given: Integers) -> Integers:
    """The place of each camera in `cameras`, -1 = it is not there."""
    if not len(cameras):
        return np.full(len(given), -1)
    place = np.minimum(np.searchsorted(cameras, given), len(cameras) - 1)
    return np.where(cameras[place] == given, place, -1)


@njit(cache=True)
def _count_pairs(
    label: Integers, place: Integers, means: Doubles, width: float, table: Doubles
) -> None:
    """Counts each pair of groups of one label; groups are sorted by label, then camera."""
    for one in range(len(label)):
        other = one + 1
        while other < len(label) and label[other] == label[one]:
            difference = means[one] - means[other]
            bin_ = int(abs(difference) / width)
            if bin_ < table.shape[2]:
                if difference > 0:
                    table[place[one], place[other], bin_] += 1
                else:
                    table[place[other], place[one], bin_] += 1
            other += 1


@njit(cache=True)
def _look_up(
    table: Doubles,
    first: Integers,
    first_frames: Integers,
    second: Integers,
    second_frames: Integers,
    width: int,
    result: Doubles,
) -> None:
    for i in range(len(first)):
        for j in range(len(second)):
            time = first_frames[i] - second_frames[j]
            bin_ = abs(time) // width
            if first[i] < 0 or second[j] < 0 or bin_ >= table.shape[2]:
                continue
            if time > 0:
                result[i, j] = table[first[i], second[j], bin_]
            else:
                result[i, j] = table[second[j], first[i], bin_]
