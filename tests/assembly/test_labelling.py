"""What clusterers advise names the key where their options stand."""

from __future__ import annotations

import pytest
import torch

from reid.assembly.data import hide_target_identities
from reid.assembly.labelling import build_labeller, clustering_config, labeller_spec
from reid.config import Config, load_config
from reid.labelling import ClusteringError, Identities, PerDomain
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


def test_what_labels_beside_a_source() -> None:
    source = ["DATASETS.SOURCE", "Market1501", "DATASETS.TRAIN", "MSMT17"]
    clusterer = {"name": "KMeans", "num_clusters": 2}
    clusters = {"name": "Clusters", "clusterer": clusterer}
    expected = {
        "source": {"name": "Identities"},
        "target": clusters,
        "all": {"name": "PerDomain", "target": clusters},
    }
    for domains, spec in expected.items():
        pairs = [*source, "DATASETS.DOMAINS", domains, "CLUSTERER",
                 "{NAME: KMeans, NUM_CLUSTERS: 2}"]  # fmt: skip
        config = load_config(None, pairs)
        assert labeller_spec(config) == spec
        alone = clustering_config(config)  # as pictures and reviews cluster
        assert alone.datasets.source is None
        assert labeller_spec(alone) == (clusters if domains != "source" else spec)
    clusterer_of_last = "{EPOCHS: 1, CLUSTERER: {NAME: KMeans, NUM_CLUSTERS: 2}}"
    stages = f"[{{EPOCHS: 1, DATASETS: {{DOMAINS: source}}}}, {clusterer_of_last}]"
    last = load_config(None, [*source, "STAGES", stages])
    assert labeller_spec(clustering_config(last)) == clusters


def test_identities_of_a_target_are_hidden() -> None:
    records = [ImageRecord(f"{number}.jpg", number, domain=number // 2) for number in range(4)]
    assert [r.pid for r in hide_target_identities(records, 1)] == [0, 1, -1, -1]
    assert hide_target_identities(records, 0) == records
    hidden = hide_target_identities(records, 1)
    target = PerDomain(Identities(), source_domains=1)(None, hidden)
    assert target.cluster.tolist() == [0, 1, -1, -1]
