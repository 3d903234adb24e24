"""Clusters of each bank of features, and the clusterer of SSG and MMT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.labelling import (
    Agglomerative,
    BankClusterer,
    ClusteringError,
    Clusters,
    JaccardDBSCAN,
    RerankedDBSCAN,
    cluster_present,
)
from reid.registry import CLUSTERER, ConfigError, build
from reid.structures import OUTLIER, FeatureSet


def groups(labels: Tensor, seed: int = 0, spread: float = 0.3) -> Tensor:
    """(N, 16) unit features around a centre for each group; each -1 lies anywhere."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, 16, generator=generator)
    noise = torch.randn(len(labels), 16, generator=generator)
    inside = centres[labels.clamp(min=0)] + spread * noise
    return F.normalize(torch.where(labels[:, None] == OUTLIER, 9 * noise, inside), dim=1)


def banks(*features: Tensor) -> FeatureSet:
    return FeatureSet.of(features[0], unit=torch.stack(features, 1))


WHOLE = torch.arange(48) % 6
UPPER = WHOLE // 2  # two persons with the same coat
LOWER = WHOLE.clone()
LOWER[:3] = OUTLIER


def spec(**options: object) -> dict[str, object]:
    return {"name": "RerankedDBSCAN", "k1": 6, "k2": 2, "rho": 0.05, "min_samples": 3, **options}


def test_three_groupings_and_images_that_are_an_outlier_in_none() -> None:
    clusterer = BankClusterer(Agglomerative(0.8, min_cluster_size=3), ("upper", "lower"))
    found = clusterer(banks(groups(WHOLE), groups(UPPER, 1), groups(LOWER, 2)))
    left_out = found.cluster == OUTLIER
    assert left_out[:3].all()
    for name in ("upper", "lower"):
        assert torch.equal(found.side[name] == OUTLIER, left_out)
        numbers = found.side[name][~left_out]
        assert torch.equal(torch.unique(numbers), torch.arange(int(numbers.max()) + 1))
    assert found.num_clusters == 6
    assert int(found.side["upper"].max()) + 1 == 3
    kept = ~left_out
    same_upper = found.side["upper"][kept][:, None] == found.side["upper"][kept]
    assert torch.equal(same_upper, UPPER[kept][:, None] == UPPER[kept])
    assert clusterer.choices["upper_clusters"] == 3


def test_names_of_the_parts() -> None:
    features = banks(*[groups(WHOLE, seed) for seed in range(3)])
    inner = JaccardDBSCAN(k1=6, k2=2, eps=0.6)
    assert [*BankClusterer(inner)(features).side] == ["part1", "part2"]
    with pytest.raises(ValueError, match=r"each of the model's 2 parts, got \['upper'\]"):
        BankClusterer(inner, ("upper",))(features)
    for names in (("upper", "upper"), ("whole",), ("",)):
        with pytest.raises(ValueError, match="names: expected different words"):
            BankClusterer(inner, names)
    alone = BankClusterer(inner)(banks(groups(WHOLE)))
    assert alone.side == {}
    assert torch.equal(alone.cluster, inner(banks(groups(WHOLE))).cluster)


def test_no_image_is_left_or_a_bank_has_no_cluster() -> None:
    """The published round trains on nothing then."""
    half = torch.arange(48) < 24
    first = groups(torch.where(half, WHOLE, OUTLIER), spread=0.15)
    second = groups(torch.where(half, OUTLIER, WHOLE), 1, spread=0.15)
    inner = Agglomerative(0.5, min_cluster_size=3)
    with pytest.raises(ClusteringError, match=r"48 images is an outlier by some feature \(whole 2"):
        BankClusterer(inner)(banks(first, second))
    nothing = groups(torch.full((48,), OUTLIER).index_fill(0, torch.tensor([0]), 0))
    with pytest.raises(ClusteringError, match="by the feature part1: no cluster among 48 images"):
        BankClusterer(inner)(banks(first, nothing))


def test_a_part_with_one_huge_cluster_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    huge = groups(torch.zeros(48).long(), 1, 0.05)
    inner = JaccardDBSCAN(k1=6, k2=2, eps=0.9, min_samples=2)
    BankClusterer(inner, ("upper",))(banks(groups(WHOLE), huge))
    assert "By the feature upper, one cluster holds" in caplog.text
    assert "they have few negatives" in caplog.text


def test_eps_of_the_first_round_stays_and_is_saved() -> None:
    first = banks(groups(WHOLE), groups(UPPER, 1), groups(LOWER, 2))
    later = banks(*[groups(WHOLE, seed, 0.5) for seed in (3, 4, 5)])
    build_one = {"name": "BankClusterer", "clusterer": spec(), "names": ["upper", "lower"]}
    clusterer: BankClusterer = build(CLUSTERER, build_one, "clusterer")
    assert clusterer.state_dict() == {}
    clusterer(first)
    state = clusterer.state_dict()
    eps = [bank["eps"] for bank in state["banks"]]
    assert len(set(eps)) == 3
    expected = clusterer(later)
    assert clusterer.state_dict() == state
    resumed: BankClusterer = build(CLUSTERER, build_one, "clusterer")
    resumed.load_state_dict(state)
    found = resumed(later)
    assert torch.equal(found.cluster, expected.cluster)
    assert all(torch.equal(found.side[name], value) for name, value in expected.side.items())
    fresh: BankClusterer = build(CLUSTERER, build_one, "clusterer")
    fresh(later)
    assert fresh.state_dict() != state
    assert clusterer.choices["whole_eps"] == eps[0]
    for broken, message in (
        ({"banks": [{"eps": -1.0}]}, "eps: expected a number above 0"),
        ({"banks": 3}, "banks: expected a list"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed.load_state_dict(broken)


def test_the_labeller_compares_the_target_with_the_source() -> None:
    inner = RerankedDBSCAN(6, 2, rho=0.05, min_samples=3, source_weight=0.1)
    labeller = Clusters(BankClusterer(inner, ("upper",)), source_domains=1)
    assert labeller.uses_source
    assert not Clusters(JaccardDBSCAN()).uses_source
    source = torch.stack((groups(torch.arange(20) % 5, 7), groups(torch.arange(20) % 4, 8)), 1)
    target = torch.stack((groups(WHOLE), groups(UPPER, 1)), 1)
    both = torch.cat((source, target))
    present = torch.ones(68, dtype=torch.bool)
    present[3] = False  # an image of the source that could not be read
    domains = (torch.arange(68) >= 20).long()
    features = FeatureSet.of(both[:, 0], unit=both, domains=domains, present=present)
    labels = labeller(features, [])
    assert (labels.cluster[:20] == OUTLIER).all()
    assert labels.num_clusters > 1
    assert ((labels.side["upper"] == OUTLIER) == (labels.cluster == OUTLIER)).all()
    eps = [bank["eps"] for bank in labeller.state_dict()["banks"]]
    for number in range(2):
        clusterer = RerankedDBSCAN(6, 2, rho=0.05, min_samples=3, source_weight=0.1)
        clusterer.take_source(FeatureSet.of(source[present[:20], number]))
        clusterer(FeatureSet.of(target[:, number]))
        assert clusterer.choices["eps"] == eps[number]
        with pytest.raises(ValueError, match="needs the features of a labelled source"):
            clusterer(FeatureSet.of(target[:, number]))  # each call needs new ones
    with pytest.raises(ValueError, match=r"but there is none; set datasets\.source"):
        Clusters(inner)


def test_images_that_could_not_be_read_are_outliers_in_all() -> None:
    features = banks(groups(WHOLE), groups(UPPER, 1))
    present = torch.ones(48, dtype=torch.bool)
    present[5] = False
    features = FeatureSet.of(features.test, unit=features.unit, present=present)
    inner = JaccardDBSCAN(k1=6, k2=2, eps=0.6)
    labels = cluster_present(BankClusterer(inner, ("upper",)), features)
    assert labels.cluster[5] == labels.side["upper"][5] == OUTLIER


def test_options_of_the_reranked_distance() -> None:
    clusterer: RerankedDBSCAN = build(CLUSTERER, spec(), "clusterer")
    assert clusterer.choices == {}
    labels = clusterer(FeatureSet.of(groups(WHOLE)))
    assert labels.num_clusters > 1
    eps = clusterer.choices["eps"]
    given = RerankedDBSCAN(6, 2, eps=eps, min_samples=3)
    assert torch.equal(given(FeatureSet.of(groups(WHOLE))).cluster, labels.cluster)
    assert given.choices == given.state_dict() == {}
    with pytest.raises(ConfigError, match=r"eps: expected float.*rho.*, got 'auto'"):
        build(CLUSTERER, spec(eps="auto"), "clusterer")
    with pytest.raises(ConfigError, match=r"0 < eps < 0\.9 \(1 - source_weight\), or rho, got 0"):
        build(CLUSTERER, spec(eps=0.95, source_weight=0.1), "clusterer")
    with pytest.raises(ConfigError, match=r"clusterer\.rho"):
        build(CLUSTERER, spec(rho=0.0), "clusterer")


def test_a_share_so_large_that_strangers_are_neighbours() -> None:
    twins = torch.eye(6).repeat(2, 1)  # each image has one at a distance of 0, and strangers
    with pytest.raises(ClusteringError, match=r"reaches pairs without any common.*clusterer\.rho"):
        cluster_present(RerankedDBSCAN(1, 1, rho=1.0), FeatureSet.of(twins))
    with pytest.raises(ClusteringError, match=r"rho: 0\.0016 of 66 pairs is no pair"):
        cluster_present(RerankedDBSCAN(2, 1), FeatureSet.of(groups(torch.arange(12) % 3)))


def test_no_cluster_says_what_to_change() -> None:
    features = FeatureSet.of(groups(WHOLE))
    with pytest.raises(
        ClusteringError, match=r"raise clusterer\.rho \(0\.01, which gave eps 0\.\d+\) or lower"
    ):
        RerankedDBSCAN(6, 2, rho=0.01, min_samples=40)(features)
    with pytest.raises(ClusteringError, match=r"raise clusterer\.eps \(0\.1\) or lower"):
        RerankedDBSCAN(6, 2, eps=0.1, min_samples=40)(features)
