"""IICS: the published labels, the losses, and data on which the published code fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.config import load_config
from reid.labelling.linkage import pair_matrix
from reid.modeling.losses import STUDENT, Criterion, Triplet
from reid.neighbors import rerank_distances
from reid.projects.iics import (
    ClusterCrossEntropy,
    EveryCameraSampler,
    InterCamera,
    IntraCamera,
    PooledHead,
)
from reid.projects.iics.clustering import Linkage, class_similarity, fill_distances
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings, FeatureSet, FeatureTokens, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
Array = npt.NDArray[np.float64]


def same_partition(one: Tensor, other: Tensor) -> bool:
    pairs = {*zip(one.tolist(), other.tolist(), strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def oracles(folder: Path) -> list[tuple[str, dict[str, Tensor]]]:
    files = sorted(folder.glob("iics_labels_*.npz"))
    assert files
    return [
        (path.name, {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()})
        for path in files
    ]


def heads_of(a: dict[str, Tensor]) -> list[Tensor]:
    parts = a["class_probability"].split(int(a["classes_per_camera"]), 1)
    return [part.contiguous() for part in parts]


def mixed(a: dict[str, Tensor]) -> npt.NDArray[np.float32]:
    matrix = np.empty((len(a["feature"]),) * 2, np.float32)
    heads = heads_of(a)

    def scores(images: slice) -> list[Tensor]:
        return [part[images] for part in heads]

    fill_distances(matrix, a["feature"], a["camid"], scores, float(a["mix_rate"]))
    return matrix


@pytest.mark.oracle
def test_similarity_and_distances_of_the_authors(oracle_dir: Path) -> None:
    for name, a in oracles(oracle_dir):
        similar = class_similarity(heads_of(a), heads_of(a))
        torch.testing.assert_close(similar, a["class_similarity"], atol=1e-5, rtol=0, msg=name)
        matrix = mixed(a)
        torch.testing.assert_close(
            torch.from_numpy(matrix), a["mixed_distance"], atol=1e-5, rtol=0, msg=name
        )
        before = matrix.astype(np.float64)
        reranked = rerank_distances(lambda images: before[images], len(before)).rows(0, len(before))  # noqa: B023
        torch.testing.assert_close(
            torch.from_numpy(reranked).float(), a["reranked"], atol=1e-5, rtol=0, msg=name
        )
        assert np.abs(reranked - a["reranked_half"].numpy()).max() < 4e-3, name
        Linkage(2).rerank(matrix)
        upper = np.triu(a["reranked"].numpy(), 1)
        np.testing.assert_allclose(matrix, upper + upper.T, atol=1e-5)


@pytest.mark.oracle
def test_labels_of_the_authors(oracle_dir: Path) -> None:
    for name, a in oracles(oracle_dir):
        by_number, _ = Linkage(int(a["num_clusters_inter"])).cut(mixed(a))
        assert same_partition(torch.from_numpy(by_number), a["label_inter"]), name
        by_share, limit = Linkage(0, share=float(a["threshold_share"])).cut(mixed(a))
        assert same_partition(torch.from_numpy(by_share), a["label_inter_threshold"]), name
        assert limit > 0
        labeller = IntraCamera(int(a["classes_per_camera"]))
        labels = labeller(FeatureSet.of(a["feature"], camids=a["camid"]), [])
        both = 1000 * a["camid"] + a["label_intra"]  # numbers start anew in each camera
        assert same_partition(labels.cluster, both), name
        assert labels.num_clusters == labels.num_proxies


def persons(per_camera: dict[int, int], seed: int = 0) -> FeatureSet:
    """Images of cameras, with as many in each."""
    camids = torch.tensor([camera for camera, count in per_camera.items() for _ in range(count)])
    feature = torch.randn(len(camids), 8, generator=torch.Generator().manual_seed(seed))
    unit = F.normalize(feature)
    return FeatureSet.of(unit, camids=camids)


def clusters_by_camera(labels: PseudoLabels) -> dict[int, int]:
    cameras, counts = labels.proxy_to_camera.unique(return_counts=True)
    return dict(zip(cameras.tolist(), counts.tolist(), strict=True))


def test_a_small_camera_and_the_later_ones(caplog: pytest.LogCaptureFixture) -> None:
    """Published: a camera with too few images lowers the number of all later ones."""
    features = persons({4: 30, 2: 12, 7: 40, 0: 9})
    published = IntraCamera(20)(features, [])
    assert clusters_by_camera(published) == {4: 20, 2: 6, 7: 6, 0: 6}
    assert "Camera 2 has 12 images, fewer than 20: it and all later cameras" in caplog.text
    alone = IntraCamera(20, small_cameras="alone")(features, [])
    assert clusters_by_camera(alone) == {4: 20, 2: 6, 7: 20, 0: 4}
    assert same_partition(published.cluster[:30], alone.cluster[:30])


def test_one_image_is_a_cluster_and_lowers_nothing() -> None:
    features = persons({0: 1, 1: 30, 5: 2, -1: 25})
    labels = IntraCamera(10)(features, [])
    assert clusters_by_camera(labels) == {0: 1, 1: 10, 5: 1, -1: 1}
    alone = IntraCamera(10, small_cameras="alone")(features, [])
    assert clusters_by_camera(alone) == {0: 1, 1: 10, 5: 1, -1: 10}


def test_images_that_could_not_be_read_are_outliers() -> None:
    features = persons({0: 30, 1: 30})
    present = torch.ones(60, dtype=torch.bool)
    present[::7] = False
    test = features.test * present[:, None]
    labels = IntraCamera(5)(FeatureSet.of(test, camids=features.camids, present=present), [])
    assert torch.equal(labels.cluster == -1, ~present)


def test_fewer_images_than_clusters_are_clusters_of_one_image() -> None:
    labeller = InterCamera(50, mix_rate=0.0)
    labels = labeller(persons({0: 20, 1: 5}), [])
    assert labels.num_clusters == 25


def criterion(features: FeatureSet, classes: int = 4) -> ClusterCrossEntropy:
    labels = IntraCamera(classes, small_cameras="alone")(features, [])
    cameras = len(features.camids.unique())
    torch.manual_seed(0)
    loss = ClusterCrossEntropy(8, classes * cameras, cameras, by_camera=True, init_std=0.5)
    loss.set_labels(labels, None)
    return loss


def test_the_weight_of_class_scores_falls_over_the_rounds() -> None:
    features = persons({0: 12, 1: 12})
    ended = Criterion([criterion(features)])
    labeller = InterCamera(5, mix_rate=0.3, rounds=10, power=0.6)
    raw = FeatureSet.of(features.test, camids=features.camids)
    raw = FeatureSet(*(getattr(raw, name) for name in raw.__dataclass_fields__ if name != "raw"),
                     raw=3 * features.test)  # fmt: skip
    for number in (0, 4, 9, 12):  # after the last one it stays 0
        labeller.begin_stage(number, ended)
        expected = 0.3 * max(0, 1 - number / 10) ** 0.6
        assert labeller.choices == {"mix": pytest.approx(expected)}
        assert labeller(raw, []).num_clusters == 5


def test_the_stage_across_cameras_needs_the_classifiers_of_the_other() -> None:
    labeller = InterCamera(5)
    with pytest.raises(ConfigError, match="the stage before, which has none; give it the loss"):
        labeller.begin_stage(0, None)
    with pytest.raises(ConfigError, match="give this stage LABELS: once"):
        labeller(persons({0: 12, 1: 12}), [])
    InterCamera(5, mix_rate=0.0).begin_stage(0, None)


def embedded(feature: Tensor) -> Embeddings:
    return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


@pytest.mark.parametrize("exact", [False, True])
def test_heads_are_those_of_the_definition(exact: bool) -> None:
    """Against BatchNorm and a linear layer for each camera, one after the other."""
    cluster = torch.tensor([0, 0, 1, 1, 2, 3, 3, 2, 4, 4, 4, 4])
    camids = torch.tensor([5, 5, 5, 5, 0, 0, 0, 0, 2, 2, 2, 2])
    labels = PseudoLabels.from_clusters(cluster, camids)
    torch.manual_seed(0)
    loss = ClusterCrossEntropy(8, 12, 3, by_camera=True, exact_classes=exact, init_std=1.0)
    nn.init.normal_(loss.neck_weight)
    loss.set_labels(labels, None)
    heads = {}
    for head, camera in enumerate((0, 2, 5)):
        neck = nn.BatchNorm1d(8)
        neck.weight.data = loss.neck_weight[head].detach().clone()
        rows = loss.weight[loss.head_of_row == head].detach()
        assert len(rows) == ((2, 1, 2)[head] if exact else 4)
        heads[camera] = neck, rows
    numbers = {5: torch.tensor([0, 0, 1, 1]), 0: torch.tensor([0, 1, 1, 0]),
               2: torch.zeros(4, dtype=torch.int64)}  # fmt: skip
    for step in range(2):
        feature = (3 * torch.randn(12, 8) + step).requires_grad_()
        batch = Batch.of(feature, camids, torch.arange(12))
        found = loss(embedded(feature), batch)["cross_entropy"]
        (gradient,) = torch.autograd.grad(found, feature)
        expected = torch.zeros(())
        for camera, (neck, rows) in heads.items():
            logits = neck(feature[camids == camera]) @ rows.T
            expected = expected + F.cross_entropy(logits, numbers[camera])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, feature)[0])
        loss.commit(embedded(feature.detach()), batch)
    other = torch.randn(6, 8)
    for scores, (neck, rows) in zip(
        loss.probabilities(other), (heads[c] for c in (0, 2, 5)), strict=True
    ):
        neck.eval()
        torch.testing.assert_close(scores, (neck(other) @ rows.T).softmax(1))


def test_one_head_for_all_cameras() -> None:
    labels = PseudoLabels.from_clusters(
        torch.tensor([0, 0, 1, 1, -1]), torch.tensor([0, 1, 0, 1, 1])
    )
    torch.manual_seed(0)
    loss = ClusterCrossEntropy(8, 6, 2, init_std=1.0)
    loss.set_labels(labels, None)
    feature = torch.randn(5, 8)
    found = loss(embedded(feature), Batch.of(feature))["cross_entropy"]
    logits = nn.BatchNorm1d(8)(feature[:4]) @ loss.weight.T  # all six rows count, two are used
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.tensor([0, 0, 1, 1])))


def test_one_cluster_has_no_negatives() -> None:
    labels = PseudoLabels.from_clusters(torch.zeros(5, dtype=torch.int64))
    losses = Criterion([ClusterCrossEntropy(8, 6), Triplet(0.3)])
    losses.set_labels(labels, None)
    feature = torch.randn(5, 8).requires_grad_()
    found = losses({STUDENT: embedded(feature)}, Batch.of(feature))
    assert found["triplet"] == 0
    (gradient,) = torch.autograd.grad(found["cross_entropy"] + found["triplet"], feature)
    assert bool(torch.isfinite(gradient).all())


def test_a_skipped_step_moves_nothing_and_one_image_has_no_variance() -> None:
    loss = criterion(persons({0: 12, 1: 12}))
    before = loss.running_mean.clone(), loss.running_var.clone()
    feature = torch.randn(9, 8)
    batch = Batch.of(feature, index=torch.tensor([*range(8), 20]))  # one image of camera 1
    assert bool(torch.isfinite(loss(embedded(feature), batch)["cross_entropy"]))
    loss.commit(embedded(feature), batch, taken=torch.tensor(False))
    assert torch.equal(loss.running_mean, before[0])
    loss.commit(embedded(feature), batch, taken=torch.tensor(True))
    assert not torch.equal(loss.running_mean[0], before[0][0])
    assert torch.equal(loss.running_mean[1], before[0][1])
    assert torch.equal(loss.running_var[1], before[1][1])


def test_labels_that_do_not_fit_the_heads() -> None:
    loss = ClusterCrossEntropy(8, 8, 2, by_camera=True)
    across = PseudoLabels.from_clusters(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="BY_CAMERA needs clusters of one camera each"):
        loss.set_labels(across, None)
    many = PseudoLabels.from_clusters(torch.arange(9), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 heads with 8 rows do not hold 9 clusters"):
        loss.set_labels(many, None)
    with pytest.raises(ValueError, match="a labeller that knows the number of classes"):
        ClusterCrossEntropy(8, 0)


def of_cameras(counts: dict[int, int], **options: int) -> EveryCameraSampler:
    camids = torch.tensor([camera for camera, count in counts.items() for _ in range(count)])
    cluster = torch.arange(len(camids)) % 3 + 3 * (camids + 1)
    sampler = EveryCameraSampler(8, **options)
    sampler.set_labels(PseudoLabels.from_clusters(cluster, camids))
    return sampler


def test_a_batch_has_as_many_images_of_every_camera_in_turn() -> None:
    counts = {3: 30, 0: 17, 12: 40}
    camids = torch.tensor([camera for camera, count in counts.items() for _ in range(count)])
    sampler = of_cameras(counts)
    assert len(sampler) == 2  # camera 0 has images for two
    batches = [*sampler]
    assert [len(batch) for batch in batches] == [24, 24]
    for batch in batches:
        assert camids[[draw.index for draw in batch]].tolist() == [0] * 8 + [3] * 8 + [12] * 8
    drawn = [draw.index for batch in batches for draw in batch]
    assert len(set(drawn)) == len(drawn)
    sampler.set_epoch(1)
    assert [draw.index for draw in next(iter(sampler))] != [draw.index for draw in batches[0]]


def test_a_camera_with_too_few_images_repeats_them() -> None:
    """Published: no batch at all, for any camera."""
    counts = {0: 3, 1: 20, 2: 1, -1: 40}
    batches = [*of_cameras(counts)]
    assert len(batches) == 2
    drawn = torch.tensor([[draw.index for draw in batch] for batch in batches])
    assert drawn.shape == (2, 32)  # images without a camera are one camera
    few = drawn[:, 8:16]  # camera 0: after the unknown one
    assert set(few.flatten().tolist()) == {0, 1, 2}
    assert (drawn[:, 24:] == 23).all()
    assert len([*of_cameras({0: 3, 1: 2})]) == 1


def test_processes_share_a_batch() -> None:
    counts = {0: 20, 1: 20, 2: 20}
    (whole, *_), parts = [*of_cameras(counts)], []
    for rank in range(5):  # 24 images do not divide by 5
        first = next(iter(of_cameras(counts, rank=rank, world_size=5)))
        assert len(first) in (4, 5)
        parts += first
    assert parts == whole


def test_the_head_gives_the_pooled_feature() -> None:
    backbone = nn.Module()
    backbone.embed_dim = 4  # type: ignore[assignment]
    tokens = torch.randn(3, 5, 4)
    found = PooledHead(backbone)(FeatureTokens(tokens, (2, 2)), Batch.of(tokens))
    assert torch.equal(found.pre[:, 0], tokens[:, 0])
    torch.testing.assert_close(found.test, F.normalize(tokens[:, 0]))
    assert not list(PooledHead(backbone).parameters())


@pytest.mark.parametrize(("name", "epochs"), [("market", 2), ("duke", 2), ("msmt", 12)])
def test_published_hyper_parameters(name: str, epochs: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    intra, inter = config.of_stage(0), config.of_stage(1)
    assert config.rounds == 40
    assert [stage.epochs for stage in config.stage_settings] == [epochs, 2]
    assert {stage.labels for stage in config.stage_settings} == {"once"}
    assert config.test.eval_period == 5 * (epochs + 2)
    assert intra.labeller == {
        "name": "IntraCamera", "clusters": 600, "small_cameras": "published",
    }  # fmt: skip
    assert intra.dataloader.sampler == {"name": "EveryCameraSampler", "images_per_camera": 8}
    assert intra.criterion == [{"name": "ClusterCrossEntropy", "by_camera": True}]
    assert inter.labeller == {
        "name": "InterCamera", "clusters": 800, "mix_rate": 0.02, "power": 0.6, "rounds": 40,
    }  # fmt: skip
    assert inter.dataloader.sampler == {
        "name": "RandomIdentitySampler", "batch_size": 64, "images_per_identity": 4,
        "epoch": "round",
    }  # fmt: skip
    assert inter.criterion == [
        {"name": "ClusterCrossEntropy"}, {"name": "Triplet", "margin": 0.3}
    ]  # fmt: skip
    for stage, rate, group in ((intra, 0.005, 8), (inter, 0.01, 64)):
        solver = stage.solver
        assert (solver.optimizer, solver.momentum, solver.weight_decay) == ("SGD", 0.9, 5e-4)
        assert (solver.base_lr, solver.lr_factors) == (rate, {"backbone": 0.1})
        assert (solver.milestones, solver.warmup_epochs, solver.amp) == ([], 0, "off")
        assert stage.model.bn_samples_per_group == group
    assert config.model.bn_running == "all"
    assert config.model.backbone == {
        "name": "AIBNResNet", "model": "resnet50", "last_stride": 1, "batch_share": 0.1,
        "mirror": True,
    }  # fmt: skip
    assert config.input.size == (256, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4], "aspect": [0.3, 3.33],
        "fill": [0.4914, 0.4822, 0.4465],
    }  # fmt: skip


def test_the_published_variant_with_thresholds() -> None:
    files = [CONFIGS / "market.yaml", CONFIGS / "variants" / "threshold.yaml"]
    config = load_config(files)
    assert config.of_stage(0).labeller == {"name": "IntraCamera", "share": 0.0025}
    labeller = config.of_stage(1).labeller
    assert labeller is not None
    assert (labeller["share"], labeller["mix_rate"]) == (0.0017, 0.02)
    assert all(config.of_stage(i).criterion[0]["exact_classes"] for i in (0, 1))
    assert InterCamera(share=0.0017).count_classes([None] * 9) == 9  # type: ignore[list-item]


def test_blocks_do_not_change_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    features = persons({0: 20, 1: 25, 5: 17})
    loss = criterion(features)
    asked: list[slice] = []

    def scores(images: slice) -> list[Tensor]:
        asked.append(images)
        return [*loss.probabilities(2 * features.test[images])]

    with pair_matrix(62) as whole, pair_matrix(62) as parts:
        fill_distances(whole, features.test, features.camids, scores, 0.2)
        assert asked == [slice(0, 62)]
        monkeypatch.setattr("reid.projects.iics.clustering._BLOCK", 9)
        monkeypatch.setattr("reid.projects.iics.clustering._GROUP", 27)
        fill_distances(parts, features.test, features.camids, scores, 0.2)
        assert max(images.stop - images.start for images in asked[1:]) == 27
        np.testing.assert_allclose(parts, whole, atol=1e-6)
        np.testing.assert_array_equal(whole, whole.T)
