"""Judges clusters: turns numbers into sentences that say what is wrong and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["good", "note", "look", "bad"]
"""Fine; worth knowing; worth a look; wrong."""
Numbers = Mapping[str, float]

# Shares, from 0 to 1. The first two are those that clusterers themselves warn of.
_BAD_OUTLIERS, _BAD_LARGEST = 0.9, 1 / 3
_MANY_OUTLIERS = 0.5
_MORE_OUTLIERS = 0.1  # growth from the first epoch to the last
_BAD_SPLIT, _MUCH_SPLIT = 0.5, 0.25
_UNSETTLED, _SETTLED = 0.5, 0.9  # agreement: adjusted Rand index between epochs
_OVERLAPPING = 0.05  # silhouette
_IMPURE = 0.7
_MANY_CLUSTERS, _FEW_CLUSTERS = 1.5, 0.67  # as a multiple of the identities


class Finding(NamedTuple):
    """A judgement about a run.

    Attributes:
        level: How serious it is.
        text: The judgement in a sentence.
        hint: Advice, or empty. Settings are written as on a command line.
    """

    level: Level
    text: str
    hint: str = ""


class SplitData(NamedTuple):
    """Counts of the training images; 0 = unknown."""

    cameras: int = 0
    identities: int = 0


def judge_clusters(
    epochs: Sequence[Numbers], clusterer: Mapping[str, Any], data: SplitData
) -> list[Finding]:
    """Judges the cluster statistics of the last epoch, partly in comparison with the first.

    Args:
        epochs: `cluster_statistics` of each epoch's labels, oldest first.
        clusterer: NAME and options with upper-case keys, for the advice.
        data: Counts of the training images.
    """
    if not epochs:
        return []
    first, last = epochs[0], epochs[-1]
    if last.get("clusters", 0) < 2:
        count = f"{last.get('clusters', 0):,.0f}"
        text = f"The last epoch has {count} clusters: there is nothing to tell apart."
        return [Finding("bad", text, _tighten(clusterer)), *_judge_kept(epochs)]
    return [
        *_judge_outliers(first, last, clusterer),
        *_judge_largest(last, clusterer),
        *_judge_cameras(first, last, clusterer, data.cameras),
        *_judge_agreement(last),
        *_judge_silhouette(last),
        *_judge_identities(last, clusterer, data.identities),
        *_judge_kept(epochs),
    ]


def judge_single_camera(single: int, clusters: int, cameras: int) -> list[Finding]:
    """Judges clusters of one camera, for clusterers whose statistics do not count them.

    Args:
        single: Number of clusters whose images come from one camera.
        clusters: Number of all clusters.
        cameras: Number of cameras in the training images; 0 = unknown.
    """
    if clusters < 2 or cameras < 2:
        return []
    return [_split_finding(single / clusters, None, {})]


def _judge_outliers(first: Numbers, last: Numbers, clusterer: Mapping[str, Any]) -> list[Finding]:
    images, share = _images(last), _share(last, "outliers")
    clusters, mean = last["clusters"], last.get("images/cluster", 0.0)
    text = (
        f"The last epoch has {clusters:,.0f} clusters of {mean:.1f} images on average; "
        f"{last.get('outliers', 0):,.0f} of {images:,.0f} images ({percent(share)}) are in none."
    )
    if share > _BAD_OUTLIERS:
        hint = f"{_loosen(clusterer)}; or start from better weights (MODEL.BACKBONE_WEIGHTS)"
        return [Finding("bad", text, hint)]
    found = [Finding("look", text, _loosen(clusterer))] if share > _MANY_OUTLIERS else []
    found = found or [Finding("good", text)]
    if share - _share(first, "outliers") > _MORE_OUTLIERS:
        found.append(
            Finding(
                "look",
                f"Outliers grow: {percent(_share(first, 'outliers'))} of the images in the first "
                f"epoch, {percent(share)} in the last.",
                "try a lower SOLVER.BASE_LR",
            )
        )
    return found


def _judge_largest(last: Numbers, clusterer: Mapping[str, Any]) -> list[Finding]:
    share = _share(last, "largest")
    if share <= _BAD_LARGEST:
        return []
    text = f"One cluster holds {percent(share)} of the images."
    hint = f"{_tighten(clusterer)}; or try a lower SOLVER.BASE_LR"
    return [Finding("bad", text, hint)]


def _judge_cameras(
    first: Numbers, last: Numbers, clusterer: Mapping[str, Any], cameras: int
) -> list[Finding]:
    # Without a split by camera, the number of proxies says nothing about cameras.
    split = last.get("proxies", 0) > last["clusters"] or last.get("cross-camera", 0) > 0
    if cameras == 1 or not split:
        return []
    share, before = (1 - numbers.get("cross-camera", 0) for numbers in (last, first))
    return [_split_finding(share, before, clusterer)]


def _split_finding(share: float, before: float | None, clusterer: Mapping[str, Any]) -> Finding:
    text = f"Clusters split by camera: {percent(share)} hold images of one camera only"
    text += "." if before is None else f", after {percent(before)} in the first epoch."
    hints = [_loosen(clusterer)] if clusterer else []
    if clusterer.get("NAME") != "CameraProxyClusterer":
        hints.append("try a loss that joins cameras (O2CAPLoss) with CameraProxyClusterer")
    hint = "; ".join([*hints, "start from weights of persons (MODEL.BACKBONE_WEIGHTS)"])
    if share > _BAD_SPLIT:
        return Finding("bad", text, hint)
    return Finding("look", text, hint) if share > _MUCH_SPLIT else Finding("good", text)


def _judge_agreement(last: Numbers) -> list[Finding]:
    agreement = last.get("agreement")
    if agreement is None or not math.isfinite(agreement):
        return []
    text = f"The last epoch's labels agree with those of the epoch before by {agreement:.2f} of 1"
    if agreement < _UNSETTLED:
        return [
            Finding(
                "look",
                f"{text}: they still change much.",
                "try more epochs (SOLVER.MAX_EPOCHS) or a lower rate at the end "
                "(SOLVER.MILESTONES, SOLVER.GAMMA)",
            )
        ]
    return [Finding("good", f"{text}: they have settled." if agreement > _SETTLED else f"{text}.")]


def _judge_silhouette(last: Numbers) -> list[Finding]:
    silhouette = last.get("silhouette")
    if silhouette is None or not silhouette < _OVERLAPPING:
        return []
    return [
        Finding(
            "look",
            f"Clusters overlap: their silhouette is {silhouette:.2f} (1: far apart, 0: on each "
            "other's border).",
            "look at the picture of clusters; try weights of persons to start from "
            "(MODEL.BACKBONE_WEIGHTS)",
        )
    ]


def _judge_identities(
    last: Numbers, clusterer: Mapping[str, Any], identities: int
) -> list[Finding]:
    """Compares clusters with identities, if these are known; training does not use them."""
    found = []
    purity = last.get("purity")
    if purity is not None and purity < _IMPURE:
        text = (
            f"Clusters mix persons: {percent(1 - purity)} of the clustered images are of another "
            "person than most of their cluster."
        )
        found.append(Finding("look", text, _tighten(clusterer)))
    if purity is None or not identities:
        return found
    text = f"There are {last['clusters']:,.0f} clusters for {identities:,} known persons"
    if last["clusters"] > _MANY_CLUSTERS * identities:
        found.append(Finding("look", f"{text}: persons are split.", _loosen(clusterer)))
    elif last["clusters"] < _FEW_CLUSTERS * identities:
        found.append(Finding("look", f"{text}: persons are joined, or lost as outliers.", ""))
    else:
        found.append(Finding("good", f"{text}."))
    return found


def _judge_kept(epochs: Sequence[Numbers]) -> list[Finding]:
    kept = sum(numbers.get("kept", 0) == 1 for numbers in epochs)
    if not kept:
        return []
    text = f"In {kept} of {len(epochs)} epochs the features gave no usable clusters, so training"
    return [Finding("bad", f"{text} used the last labels again.", "see the warnings below")]


_WAYS: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "JaccardDBSCAN": (("raise", "EPS"), ("lower", "EPS")),
    "CameraProxyClusterer": (("raise", "EPS"), ("lower", "EPS")),
    "Agglomerative": (("raise", "DISTANCE_THRESHOLD"), ("lower", "DISTANCE_THRESHOLD")),
    "HDBSCAN": (("lower", "MIN_SAMPLES"), ("lower", "MIN_CLUSTER_SIZE")),
    "Infomap": (("lower", "MIN_SIMILARITY"), ("raise", "MIN_SIMILARITY")),
    "KMeans": (("lower", "NUM_CLUSTERS"), ("raise", "NUM_CLUSTERS")),
}
"""By clusterer: the option that makes larger clusters, the one that makes smaller ones."""


def _loosen(clusterer: Mapping[str, Any]) -> str:
    return _change(clusterer, 0)


def _tighten(clusterer: Mapping[str, Any]) -> str:
    return _change(clusterer, 1)


def _change(clusterer: Mapping[str, Any], way: int) -> str:
    name = str(clusterer.get("NAME") or "")
    if name not in _WAYS:
        return f"try other options of {name}" if name else "try other options of the clusterer"
    verb, option = _WAYS[name][way]
    value = clusterer.get(option)
    return f"{verb} CLUSTERER.{option}" + ("" if value is None else f" (now {value})")


def _images(numbers: Numbers) -> float:
    clustered = numbers.get("clusters", 0) * numbers.get("images/cluster", 0)
    return clustered + numbers.get("outliers", 0)


def _share(numbers: Numbers, name: str) -> float:
    images = _images(numbers)
    return numbers.get(name, 0) / images if images else 0.0


def percent(share: float, digits: int = 0) -> str:
    """A share from 0 to 1 in percent."""
    return f"{100 * share:.{digits}f} %"
