"""Times the ranking of a gallery, from features to mAP and CMC."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation.ranking import rank
from reid.structures import FeatureSet
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, peak_mb, synchronize

_LIMIT = 1e-5


def run(context: Context) -> None:
    """Ranks on the device and on the CPU; both must give the same numbers."""
    sizes, device = context.sizes, context.device
    queries, gallery = sizes.ranked[:2]
    problem = make_ranked(sizes.ranked, sizes.dim)
    places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    values = []
    for place in places:
        if not context.enough(2 * sizes.seconds, f"ranking on {place.type}"):
            continue
        free_memory(place)
        given = {
            name: value.to(place) if name.endswith("feat") else value
            for name, value in problem.items()
        }
        few = {
            name: value[:10] if name.startswith("query") else value for name, value in given.items()
        }
        mean_precision(few)
        synchronize(place)
        begun = time.perf_counter()
        found = mean_precision(given)
        taken = time.perf_counter() - begun
        values.append(found)
        context.found.row(
            f"Ranking {queries:,} queries against {gallery:,} images of {sizes.dim} dimensions",
            place=place.type, seconds=taken, queries_per_s=queries / taken, mAP=found,
            peak_MB=peak_mb(place),
        )  # fmt: skip
        if place == device:
            context.found.number("seconds", taken)
    if len(values) == 2:
        context.found.check(
            f"the mAP agrees with the CPU's to {_LIMIT:g}", abs(values[0] - values[1]) <= _LIMIT,
            f"{values[0]:.7f} and {values[1]:.7f}",
        )  # fmt: skip


def mean_precision(problem: Mapping[str, Any]) -> float:
    """The mAP of the features from `make_ranked`."""
    query, gallery = (
        FeatureSet.of(*(problem[f"{split}_{name}"] for name in ("feat", "pids", "camids")))
        for split in ("query", "gallery")
    )
    return rank(query, gallery).ranking.mAP


def make_ranked(sizes: tuple[int, int, int, int], dim: int) -> dict[str, Tensor]:
    """Unit features of queries and gallery, with identities and cameras, on the CPU."""
    queries, gallery, persons, cameras = sizes
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(persons, dim, generator=generator)
    problem = {}
    for split, count in (("query", queries), ("gallery", gallery)):
        pids = torch.randint(persons, (count,), generator=generator)
        noise = 2.5 * torch.randn(count, dim, generator=generator)
        problem[f"{split}_feat"] = F.normalize(noise.add_(centres[pids]), dim=1)
        problem[f"{split}_pids"] = pids
        problem[f"{split}_camids"] = torch.randint(cameras, (count,), generator=generator)
    return problem
