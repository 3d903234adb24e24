"""Times the stages from features to pseudo-labels."""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor

from reid.neighbors import dbscan, jaccard_rows, nearest_neighbors
from reid.structures import PseudoLabels
from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.features import trained_like
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, peak_mb, synchronize

_K1, _K2, _EPS, _MIN_SAMPLES = 20, 6, 0.5, 4


def run(context: Context) -> None:
    """Times a training set of MSMT17's size, then a large one, on the device and on the CPU."""
    sizes, device = context.sizes, context.device
    _labels(trained_like(300, sizes.dim).to(device), context)  # lets numba compile first
    few, many = sizes.clustered
    places = [(few, device), (many, device)]
    if device.type == "cuda":
        places.append((few, torch.device("cpu")))
    for count, place in places:
        # The time grows; a try that is sure to be cut off would only cost later sections time.
        if not context.enough(5 * sizes.seconds, f"{count:,} features on {place.type}"):
            continue
        features = trained_like(count, sizes.dim).to(place)
        taken, clusters, outliers, peak = _labels(features, context)
        context.found.row(
            f"Pseudo-labels of features of {sizes.dim} dimensions, k1 {_K1}, k2 {_K2}, eps {_EPS}",
            images=count, place=place.type, **taken, all_s=sum(taken.values()), clusters=clusters,
            outliers=outliers, peak_MB=peak,
        )  # fmt: skip
        if place == device:
            name = "few" if count == few else "many"
            context.found.number(f"seconds_{name}", sum(taken.values()))


def _labels(features: Tensor, context: Context) -> tuple[dict[str, float], int, int, float | None]:
    """Seconds by stage, clusters, outliers, and the peak of the device's memory."""
    device = features.device
    free_memory(device)
    k = min(_K1, len(features))
    marks = [_now(device)]
    nearest_neighbors(features, k)
    marks.append(_now(device))
    distances = jaccard_rows(features, _K1, _K2, max_distance=_EPS + 1e-5)
    marks.append(_now(device))
    found = torch.from_numpy(dbscan(distances, _EPS, _MIN_SAMPLES))
    camids = torch.arange(len(found)) % parts.CAMERAS
    labels = PseudoLabels.from_clusters(found, camids)
    marks.append(_now(device))
    search, graph, rest = (b - a for a, b in itertools.pairwise(marks))
    taken = {"search_s": search, "Jaccard_s": max(graph - search, 0.0), "DBSCAN_s": rest}
    return taken, labels.num_clusters, labels.num_outliers, peak_mb(device)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
