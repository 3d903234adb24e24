"""MGH: the published numbers, and data on which the published code fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.evaluation.time_histograms import count_times
from reid.labelling import ClusteringError, JaccardDBSCAN, KMeans
from reid.neighbors import rerank_distances
from reid.projects.mgh import HypergraphLabels, MGHLoss, MGHSampler
from reid.projects.mgh.distance import (
    JointDistance,
    camera_weights,
    dbscan_of_rows,
    mean_to_groups,
    nearest_lists,
    rows_of_graph,
)
from reid.projects.mgh.hypergraph import (
    Graph,
    Spreading,
    correct_labels,
    find_seeds,
    incidence,
    spread,
)
from reid.projects.mgh.loss import missing_precision
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def rows_of(distance: Any) -> Callable[..., Any]:
    whole = np.asarray(distance, np.float64)
    return lambda images: whole[images].copy()


def close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
    scale = max(1.0, float(np.abs(np.asarray(expected)).max()))
    assert error <= tolerance * scale, f"{what}: {error}"


@pytest.mark.oracle
def test_label_correction_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("mgh_labels_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        cluster, rows, name = a["cluster_label"], rows_of(a["distance"]), path.name
        matrix = incidence(rows, (cluster, a["camera_cluster_label"]), a["knn"].tolist())
        close(np.asarray(matrix.sum(0)).ravel(), a["incidence_degree"], 1e-5, f"{name} edges")
        graph = Graph.of(matrix, torch.device("cpu"), len(a["knn"]))
        close(graph.degree, a["node_degree"], 1e-5, f"{name} degrees")
        identity = torch.eye(len(cluster), dtype=torch.float64)
        close(graph.symmetric(identity), a["symmetric_adjacency"], 1e-5, f"{name} symmetric")
        close(graph.random_walk(identity), a["random_walk_adjacency"], 1e-5, f"{name} walk")
        likeness = 1 - mean_to_groups(rows, cluster, 0, cluster.max() + 1)
        close(likeness.T, a["similarity"], 1e-5, f"{name} similarity")
        seeds, total = find_seeds(rows, cluster)
        assert np.array_equal(seeds, a["seed_label"]), name
        prediction = torch.from_numpy((np.exp(likeness / 0.05) / total).T)
        close(prediction, a["prediction"], 1e-5, f"{name} prediction")
        numbers = Spreading(tuple(a["alpha"]), float(a["scale"]), int(a["steps"]))
        score = spread(graph, prediction, torch.from_numpy(seeds), 0, numbers)
        close(score, a["score"], 1e-5, f"{name} score")
        assert np.array_equal(correct_labels(rows, cluster, graph, numbers), a["new_label"]), name


@pytest.mark.oracle
def test_distances_and_first_labels_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("mgh_labels_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        cluster, count, camids = a["cluster_label"], len(a["feature"]), a["camid"]
        model = count_times(
            cluster, camids, a["frame"], num_bins=3000, same_camera="visits"
        ).smoothed(50)
        feature = torch.from_numpy(a["feature"]).double()
        joint = JointDistance(feature, camids, a["frame"], model)
        columns = joint.columns(np.arange(count))
        close(columns.T, a["joint_distance"], 1e-5, f"{path} joint")
        found = rerank_distances(joint.columns, count, lambda_value=0.5).rows(0, count)
        close(found, a["distance"], 4e-3, f"{path} distance")
        clusterer = JaccardDBSCAN()
        given = a["camera_cluster_label"]
        if len({(c, k) for c, k in zip(given, camids, strict=True) if c >= 0}) == len(
            set(given) - {-1}
        ):  # none spans cameras
            features = FeatureSet.of(feature.float(), camids=torch.from_numpy(camids))
            inside = HypergraphLabels(clusterer)._clusters_in_cameras(features, camids)
        else:
            inside = dbscan_of_rows(rows_of(a["distance"]), count, 0.5, 4)
        assert same_partition(inside, given), path


def same_partition(one: Any, other: Any) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def targets(distance: Any, labels: PseudoLabels, camids: Any, length: int, threshold: float) -> Any:
    rows = rows_of(distance)
    near, relevant = nearest_lists(rows, len(labels), length, threshold)
    weight = camera_weights(rows, labels.proxy.numpy(), camids, labels.proxy_to_camera.numpy())
    return {"camera_weight": weight, "nearest": near, "relevant": relevant}


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("mgh_memory_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        camids = torch.from_numpy(a["camid"])
        labels = PseudoLabels.from_clusters(torch.from_numpy(a["cluster_label"]), camids)
        assert np.array_equal(labels.proxy_to_cluster, a["proxy_cluster"])
        side = targets(
            a["distance"], labels, a["camid"], int(a["list_length"]),
            float(a["relevance_threshold"]),
        )  # fmt: skip
        labels = with_side(labels, side)
        loss = MGHLoss(
            float(a["temperature"]), float(a["momentum"]), float(a["identity_scale"]),
            float(a["instance_scale"]), 0, int(a["neg_k"]),
            "soft" if int(a["camera_weighted"]) else "hard", float(a["anneal"]),
        )  # fmt: skip
        feature = torch.from_numpy(a["feature"]).double()
        loss.set_labels(labels, FeatureSet.of(feature, camids=camids))
        close(loss.memory.rows[0], a["memory"], 1e-6, f"{path} memory")
        for step in range(3):
            given = {k.split(".")[1]: a[k] for k in a if k.startswith(f"step{step}.")}
            index = torch.from_numpy(given["index"])
            f = torch.from_numpy(given["feature"]).double().requires_grad_()
            unit = F.normalize(f, dim=1)
            seen = Embeddings(f[:, None], f[:, None], unit[:, None], unit), batch_of(index)
            losses = loss(*seen)
            total = torch.stack([*losses.values()]).sum()
            total.backward()
            losses, total = {k: v.detach() for k, v in losses.items()}, total.detach()
            for name in ("camera", "identity", "instance"):
                found, expected = float(losses[f"global_{name}"]), float(given[f"{name}_loss"])
                assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), f"{path} {step} {name}"
            assert float(total) == pytest.approx(float(given["loss"]), rel=1e-5)
            assert f.grad is not None
            largest = float(np.abs(given["grad"]).max())
            error = float((f.grad - torch.from_numpy(given["grad"])).abs().max())
            assert error <= 1e-5 * largest, f"{path} {step} gradient {error / largest}"
            loss.commit(*seen)
            close(loss.memory.rows[0], given["memory_after"], 1e-6, f"{path} {step} memory")


def with_side(labels: PseudoLabels, side: Any) -> PseudoLabels:
    return PseudoLabels(
        labels.cluster, labels.proxy, labels.proxy_to_cluster, labels.proxy_to_camera, side
    )


def batch_of(index: Tensor) -> Batch:
    return Batch.of(torch.empty(len(index), 0), index=index)


def test_missing_precision_is_the_definition() -> None:
    score = torch.tensor([0.9, 0.895, 0.4, 0.91], dtype=torch.float64)
    s = score.numpy()
    relevant = torch.tensor([True, False, True, False])

    def rank(a: int, among: list[int]) -> float:
        step = [1 / (1 + np.exp(-np.clip((s[b] - s[a]) / 0.01, -50, 50))) for b in among]
        return 1 + float(sum(step))

    expected = np.mean(
        [
            rank(a, [b for b in (0, 2) if b != a]) / rank(a, [b for b in range(4) if b != a])
            for a in (0, 2)
        ]
    )
    assert float(missing_precision(score, relevant, 0.01)) == pytest.approx(1 - expected)
    moving = score.clone().requires_grad_()
    none = missing_precision(moving, torch.zeros(4, dtype=torch.bool), 0.01)
    none.backward()  # published: 0 / 0
    assert float(none.detach()) == 0
    assert moving.grad is not None
    assert not moving.grad.any()


def test_dbscan_of_rows_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for eps in (0.2, 0.5, 3.0):
        points = rng.random((80, 2))
        distance = np.abs(points[:, None] - points).sum(2) + 0.1 * rng.random((80, 80))
        np.fill_diagonal(distance, 0)
        expected = sklearn.cluster.DBSCAN(eps=eps, min_samples=4, metric="precomputed")
        found = dbscan_of_rows(rows_of(distance), 80, eps, 4)
        assert np.array_equal(found, expected.fit_predict(distance))


def test_blocks_do_not_change_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    distance = rng.random((60, 60))
    cluster = rng.integers(-1, 9, 60)
    cluster = PseudoLabels.from_clusters(torch.from_numpy(cluster)).cluster.numpy()

    def result() -> list[Any]:
        rows = rows_of(distance)
        matrix = incidence(rows, (cluster, cluster), (3, 8))
        graph = Graph.of(matrix, torch.device("cpu"), 2)
        weight = camera_weights(rows, cluster, cluster % 3, np.arange(cluster.max() + 1) % 3)
        return [matrix.toarray(), correct_labels(rows, cluster, graph, Spreading()), weight]

    whole = result()
    monkeypatch.setattr("reid.neighbors.reranking._BLOCK_BYTES", 8 * 60 * 7)
    monkeypatch.setattr("reid.projects.mgh.hypergraph._BLOCK_BYTES", 8 * 60 * 2)
    for one, other in zip(whole, result(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    for c in range(cluster.max() + 1):
        expected = distance[cluster == c].mean(0)
        assert np.allclose(mean_to_groups(rows_of(distance), cluster, c, c + 1), expected)


def test_an_image_far_from_itself_stays_in_its_edge() -> None:
    distance = 1 + np.random.default_rng(2).random((12, 12))
    np.fill_diagonal(distance, 9)
    matrix = incidence(rows_of(distance), (np.zeros(12, np.int64),), (3,))
    assert np.allclose(matrix.toarray()[np.arange(12), np.arange(12)], 1)
    assert (np.asarray((matrix > 0).sum(0)).ravel()[:12] == 4).all()


def test_lists_are_stored_as_what_each_adds() -> None:
    rng = np.random.default_rng(3)
    distance = rng.random((120, 120))
    np.fill_diagonal(distance, 0)
    distance[7, 7] = 9  # in none of its lists: it takes the last place in each
    matrix = incidence(rows_of(distance), (rng.integers(-1, 5, 120),), (10, 30, 50))
    values = torch.from_numpy(rng.random((120, 4)))
    plain, rings = (Graph.of(matrix, torch.device("cpu"), lists) for lists in (0, 3))
    assert (plain.rings._nnz(), rings.rings._nnz()) == (120 * (11 + 31 + 51 + 1), 120 * (51 + 1))
    expected = matrix @ (matrix.T @ values.numpy())
    for graph in (plain, rings):
        walked = graph.random_walk(values).numpy() * graph.degree.numpy()[:, None]
        np.testing.assert_allclose(walked, expected, rtol=1e-12)


def test_a_graphs_missing_pairs_are_at_distance_1() -> None:
    graph = scipy.sparse.csr_matrix(([0.0, 0.5, 0.0, 0.5], ([0, 0, 1, 1], [0, 1, 1, 0])), (3, 3))
    expected = [[1, 1, 1], [0.5, 0, 1], [0, 0.5, 1]]
    assert rows_of_graph(graph)(np.array([2, 1, 0])).tolist() == expected


def persons(count: int = 6, cameras: int = 3, each: int = 4, noise: float = 0.05) -> FeatureSet:
    """Persons that pass three cameras at fixed times; images are noisy."""
    generator = torch.Generator().manual_seed(3)
    pid = torch.arange(count).repeat_interleave(cameras * each)
    camid = torch.arange(cameras).repeat_interleave(each).repeat(count)
    centre = F.normalize(torch.randn(count, 16, generator=generator), dim=1)
    noisy = centre[pid] + noise * torch.randn(len(pid), 16, generator=generator)
    frame = 1000 * pid + 400 * camid + torch.arange(len(pid)) % each
    return FeatureSet.of(F.normalize(noisy, dim=1), pid, camid, frames=frame)


def labeller(**options: Any) -> HypergraphLabels:
    clusterer = JaccardDBSCAN(k1=8, k2=3, eps=0.6, min_samples=2)
    return HypergraphLabels(clusterer, **{"neighbors": (3, 5), "from_epoch": 1, **options})


def test_labels_by_epoch() -> None:
    features, parts = persons(), labeller()
    first, second = parts(features, []), parts(features, [])
    assert parts.choices["corrected"] == 0
    third = parts(features, [])
    assert set(first.side) == {"camera_weight"}
    assert set(second.side) == set(third.side) == {"camera_weight", "nearest", "relevant"}
    for labels in (first, second):
        assert same_partition(labels.cluster, features.pids)
        assert labels.num_proxies == 18
    assert third.num_clusters > 1  # the edge of nearly all images makes it worse on so few
    assert second.side["nearest"].shape == (72, 72)  # all images: fewer than the list is long
    again = labeller()
    again(features, [])
    resumed = labeller()
    resumed.load_state_dict(again.state_dict())
    other = resumed(features, [])
    assert torch.equal(other.cluster, second.cluster)
    assert torch.equal(other.side["camera_weight"], second.side["camera_weight"])


def test_a_wrong_label_is_corrected() -> None:
    """A cluster label that time and appearance speak against becomes its neighbours' label."""
    features = persons()
    wrong = features.pids.clone()
    wrong[5] = 4
    rows = labeller()._joint_rows(features, wrong.numpy(), features.camids.numpy())
    matrix = incidence(rows, (wrong.numpy(), np.full(72, -1)), (3, 5))
    found = correct_labels(rows, wrong.numpy(), Graph.of(matrix, torch.device("cpu")), Spreading())
    assert np.array_equal(found, features.pids.numpy())


def test_unreadable_images_are_outliers() -> None:
    features = persons()
    feature, present = features.test.clone(), torch.ones(72, dtype=torch.bool)
    present[[3, 40]] = False
    feature[~present] = 0
    broken = FeatureSet.of(
        feature, features.pids, features.camids, frames=features.frames, present=present
    )
    labels = labeller(from_epoch=0)(broken, [])
    assert labels.cluster[~present].tolist() == [-1, -1]
    near = labels.side["nearest"].long()[present]
    assert set(near.unique().tolist()) == set(present.nonzero()[:, 0].tolist())
    assert labels.side["relevant"][~present].sum() == 0
    assert same_partition(labels.cluster[present], features.pids[present])


@pytest.mark.parametrize("kind", ["gaps", "outlier camera", "one image", "far", "unknown"])
def test_cameras_and_times_that_break_the_published_code(kind: str) -> None:
    features = persons()
    camids, frames, feature = features.camids.clone(), features.frames.clone(), features.test
    if kind == "gaps":
        camids = camids * 7 + 2
    elif kind == "outlier camera":  # two images that are like no others
        feature = torch.cat((feature, torch.eye(16)[:2]))
        camids, frames = torch.cat((camids, torch.tensor([9, 9]))), torch.cat((frames, frames[:2]))
    elif kind == "one image":
        camids[0] = 11
    elif kind == "far":
        frames[::2] += 10**9
    else:
        camids[:] = -1
    features = FeatureSet.of(feature, None, camids, frames=frames)
    parts = labeller(from_epoch=0)
    for labels in (parts(features, []), parts(features, [])):
        assert labels.num_clusters > 1
        for name, value in labels.side.items():
            assert bool(torch.isfinite(value.float()).all()), name
        MGHLoss(from_epoch=0).set_labels(labels, features)


def test_missing_frames_and_small_sets_are_refused() -> None:
    features = persons()
    frames = features.frames.clone()
    frames[:5] = -1
    unknown = FeatureSet.of(features.test, None, features.camids, frames=frames)
    labeller()(unknown, [])  # before the correction, frames are not needed
    with pytest.raises(ClusteringError, match="frame number of each image, but 5 of 72 have none"):
        labeller(from_epoch=0)(unknown, [])
    with pytest.raises(ClusteringError, match=r"lists of 90 .* half of 72 images.*at most 3"):
        labeller(from_epoch=0, neighbors=(10, 90))(features, [])


def test_long_lists_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    labeller(from_epoch=0, neighbors=(3, 12))(persons(), [])
    assert "the longest list, 12, is long for 72 images" in caplog.text


@pytest.mark.parametrize(("threshold", "idle"), [(-1.0, True), (0.5, False)])
def test_lists_that_rank_nothing_are_warned_of(
    threshold: float, idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    labels = labeller(from_epoch=0, relevance_threshold=threshold)(persons(), [])
    assert bool(labels.side["relevant"].all(1).all()) == idle
    assert ("for 72 of 72 images all of their 72 nearest are relevant" in caplog.text) == idle


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="expected JaccardDBSCAN, got KMeans"):
        HypergraphLabels(KMeans(3))
    with pytest.raises(ValueError, match="neighbors: expected numbers of 1 or more"):
        HypergraphLabels(JaccardDBSCAN(), neighbors=(0,))
    with pytest.raises(ValueError, match="features of the training images"):
        labeller()(None, [])
    for options in ({"identity_weight": -1}, {"instance_weight": -1}, {"from_epoch": -1},
                    {"anneal": 0}, {"camera_target": "some"}, {"num_negatives": 0}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            MGHLoss(**options)  # type: ignore[arg-type]


def test_labels_without_targets_are_refused() -> None:
    features = persons()
    labels = PseudoLabels.from_clusters(features.pids, features.camids)
    with pytest.raises(ValueError, match="needs labels with camera_weight, which the labeller"):
        MGHLoss().set_labels(labels, features)
    with pytest.raises(ValueError, match="needs labels with nearest, relevant"):
        MGHLoss(camera_target="hard", from_epoch=0).set_labels(labels, features)
    MGHLoss(camera_target="hard", from_epoch=0, instance_weight=0).set_labels(labels, features)


def test_losses_begin_in_their_epoch_and_skip_outliers() -> None:
    features = persons()
    labels = labeller(from_epoch=0)(features, [])
    loss = MGHLoss(from_epoch=2)
    index = torch.arange(0, 72, 9)
    f = features.test[index]
    given = Embeddings(f[:, None], f[:, None], f[:, None], f), batch_of(index)
    for epoch, begun in ((0, False), (1, False), (2, True)):
        loss.epoch = epoch
        loss.set_labels(labels, features)
        values = loss(*given)
        assert float(values["global_camera"]) > 0
        assert bool(values["global_identity"] > 0) == begun
        assert bool(values["global_instance"] > 0) == begun
    outliers = PseudoLabels.from_clusters(
        torch.where(torch.isin(torch.arange(72), index), -1, features.pids), features.camids
    )
    side = targets(1 - features.test @ features.test.T, outliers, features.camids.numpy(), 5, 0.1)
    loss.set_labels(with_side(outliers, side), features)
    assert not any(float(value) for value in loss(*given).values())


def test_parts_have_losses_of_their_own() -> None:
    features = persons()
    unit = torch.stack((features.test, features.test.flip(1), -features.test), 1)
    parts = FeatureSet.of(features.test, None, features.camids, unit=unit, frames=features.frames)
    loss = MGHLoss(from_epoch=0, part_weight=0.5)
    loss.set_labels(labeller(from_epoch=0)(parts, []), parts)
    index = torch.arange(0, 72, 5)
    f = unit[index] + 0.1
    values = loss(Embeddings(f, f, F.normalize(f, dim=2), f[:, 0]), batch_of(index))
    assert {name for name, value in values.items() if value > 0} == {
        f"{bank}_{name}"
        for bank in ("global", "part")
        for name in ("camera", "identity", "instance")
    }


def sampler_of(sizes: list[int], **options: Any) -> MGHSampler:
    sampler = MGHSampler(8, 4, **{"steps_per_epoch": 50, **options})
    cluster = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sampler.set_labels(PseudoLabels.from_clusters(cluster))
    return sampler


def test_no_batch_is_lost_by_default() -> None:
    sampler = sampler_of([1, 5, 6, 7, 4, 9], steps_per_epoch=3)
    images = {draw.index for batch in sampler for draw in batch}
    cluster = [0] + [1] * 5 + [2] * 6 + [3] * 7 + [4] * 4 + [5] * 9
    assert {cluster[index] for index in images} == set(range(6))


def test_the_published_sampler_loses_batches() -> None:
    """After the proxy of one image no batch of the pass is full: image 0 never comes."""
    sampler = sampler_of([1, 5, 6, 7, 4, 9], lose_batches=True)
    batches = [[draw.index for draw in batch] for batch in sampler]
    assert [len(batch) for batch in batches] == [8] * 50
    assert all(0 not in batch for batch in batches)
    # proxies of one image in fours fill a place together, and images of small proxies are repeated
    fours = sampler_of([1] * 8, lose_batches=True, steps_per_epoch=1)
    assert sorted(draw.index for draw in next(iter(fours))) == list(range(8))
    again = sampler_of([1, 5, 6, 7, 4, 9], lose_batches=True)
    assert [[draw.index for draw in batch] for batch in again] == batches
    with pytest.raises(ValueError, match="1000 passes over 1 proxies filled no batch of 8"):
        list(sampler_of([1], lose_batches=True))


@pytest.mark.parametrize(("name", "k1", "weight"), [("market", 20, 10), ("duke", 20, 100),
                                                    ("msmt", 30, 100)])  # fmt: skip
def test_published_hyper_parameters(name: str, k1: int, weight: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "MGHSampler", "batch_size": 32, "images_per_proxy": 4, "steps_per_epoch": 400,
        "lose_batches": False,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "JaccardDBSCAN", "k1": k1, "k2": 6, "eps": 0.5, "min_samples": 4,
    }  # fmt: skip
    assert config.labeller == {
        "name": "HypergraphLabels", "from_epoch": 5, "neighbors": [10, 30, 50, 70, 90],
        "distance_eps": 0.5, "list_length": 1000, "relevance_threshold": 0.1,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "MGHLoss", "temperature": 0.07, "momentum": 0.2, "identity_weight": 1.0,
        "instance_weight": weight, "from_epoch": 5, "num_negatives": 50, "camera_target": "soft",
        "anneal": 0.01,
    }]  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 0)
    assert (solver.max_epochs, solver.milestones, solver.gamma) == (50, [20, 40], 0.1)
    assert (solver.bias_lr_factor, solver.warmup_epochs, solver.amp) == (2, 0, "off")
    assert config.seed == 1
