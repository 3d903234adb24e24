"""Labels of two domains: identities of the source, clusters of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from reid.labelling import Identities, Labeller, PerDomain
from reid.structures import FeatureSet, ImageRecord, ProgressBar, PseudoLabels

PIDS = [4, 9, -1, 4, 2, 2]  # the first four are the source's, with gaps and an unlabelled one
RECORDS = [
    ImageRecord(f"{number}.jpg", pid=pid, camid=number % 2 + 2 * (number > 3), domain=number > 3)
    for number, pid in enumerate([*PIDS, 7, 7])
]


class Halves(Labeller):
    """Two clusters in turn and an outlier; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: Sequence[ImageRecord] = ()
        self.calls = 0

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        assert features is not None
        assert len(features) == len(records)
        assert features.test[:, 0].tolist() == [4, 5, 6, 7]
        self.seen, self.calls = records, self.calls + 1
        cluster = torch.tensor([1, 0, -1, 1])
        labels = PseudoLabels.from_clusters(cluster, features.camids)
        return PseudoLabels(
            labels.cluster,
            labels.proxy,
            labels.proxy_to_cluster,
            labels.proxy_to_camera,
            {
                "upper": torch.tensor([0, 0, -1, 1]),
                "score": torch.tensor([0.5, 0.25, 0.0, 1.0]),
            },
        )

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]


def features() -> FeatureSet:
    number = torch.arange(8.0)[:, None]
    return FeatureSet.of(number, camids=torch.tensor([record.camid for record in RECORDS]))


def test_labels_are_numbered_without_collision() -> None:
    target = Halves()
    labels = PerDomain(target, source_domains=1)(features(), RECORDS)
    assert labels.cluster.tolist() == [0, 1, -1, 0, 3, 2, -1, 3]
    assert labels.num_clusters == 4
    assert labels.proxy_to_cluster[labels.proxy[[4, 5, 7]]].tolist() == [3, 2, 3]
    assert labels.proxy.unique().tolist() == [-1, *range(labels.num_proxies)]
    assert labels.side["upper"].tolist() == [-1, -1, -1, -1, 0, 0, -1, 1]
    assert labels.side["score"].tolist() == [0, 0, 0, 0, 0.5, 0.25, 0, 1]
    assert target.seen == RECORDS[4:]


def test_its_state_is_that_of_its_labellers() -> None:
    labeller = PerDomain(Halves(), source_domains=1)
    labeller(features(), RECORDS)
    assert labeller.state_dict() == {"target": {"calls": 1}}
    other = PerDomain(Halves(), Identities(), source_domains=1)
    other.load_state_dict(labeller.state_dict())
    assert other.state_dict() == labeller.state_dict()
    assert not labeller.needs_source  # identities need no features
    assert PerDomain(Halves(), Halves(), source_domains=1).needs_source


def test_there_must_be_a_source() -> None:
    with pytest.raises(ValueError, match=r"datasets\.source is not set"):
        PerDomain(Halves())


def test_labels_of_some_images() -> None:
    labels = PseudoLabels.from_clusters(
        torch.tensor([3, 0, -1, 3, 1]), torch.tensor([0, 1, 0, 1, 1])
    )
    some = labels[torch.tensor([0, 2, 3, 1])]
    assert some.cluster.tolist() == [1, -1, 1, 0]
    assert some.proxy.tolist() == [1, -1, 2, 0]
    assert some.proxy_to_cluster.tolist() == [0, 1, 1]
    assert some.proxy_to_camera.tolist() == [1, 0, 1]
    assert labels[torch.tensor([2])].num_clusters == 0
