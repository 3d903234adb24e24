"""What clusterers advise names the key where their options stand."""

from __future__ import annotations

import pytest
import torch

from reid.assembly.labelling import build_labeller
from reid.config import Config, load_config
from reid.labelling import ClusteringError
from reid.registry import ConfigError
from reid.structures import FeatureSet, ImageRecord

RECORDS = [ImageRecord(f"{number}.jpg", number) for number in range(4)]


def advice(config: Config) -> str:
    labeller = build_labeller(config, RECORDS, "own")
    with pytest.raises(ClusteringError) as caught:
        labeller(FeatureSet.of(torch.eye(4)), RECORDS)
    return str(caught.value)


@pytest.mark.parametrize(("pairs", "key"), [
    (["CLUSTERER", "{NAME: KMeans, NUM_CLUSTERS: 9}"], "clusterer"),
    (["LABELLER", "Clusters", "CLUSTERER", "{NAME: KMeans, NUM_CLUSTERS: 9}"], "clusterer"),
    (["LABELLER", "{NAME: Clusters, CLUSTERER: {NAME: KMeans, NUM_CLUSTERS: 9}}"],
     "labeller.clusterer"),
])  # fmt: skip
def test_too_few_images(pairs: list[str], key: str) -> None:
    assert advice(load_config(None, pairs)) == (
        f"4 images are too few for 9 clusters: lower {key}.num_clusters (9)"
    )


def test_no_cluster_at_all() -> None:
    spec = "{NAME: Clusters, CLUSTERER: {NAME: JaccardDBSCAN, EPS: 0.01, K1: 2, K2: 1}}"
    message = advice(load_config(None, ["LABELLER", spec]))
    assert "raise labeller.clusterer.eps (0.01) or lower labeller.clusterer.min_samples" in message


def test_a_wrong_option_is_named_where_it_stands() -> None:
    wrong = "{NAME: KMeans, NUM_CLUSTERS: 0}"
    for pairs, key in (
        (["LABELLER", "Clusters", "CLUSTERER", wrong], "clusterer"),
        (["LABELLER", f"{{NAME: Clusters, CLUSTERER: {wrong}}}"], "labeller.clusterer"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key} \(KMeans\): num_clusters: expected 1 or"):
            build_labeller(load_config(None, pairs), RECORDS, "own")
