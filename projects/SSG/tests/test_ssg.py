"""SSG: its loss, head and sampler, and what breaks the published code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid.data.samplers import PKSampler
from reid.modeling.model import ReIDModel
from reid.projects.ssg import PassSampler, SelfSimilarityHead, SSGLoss
from reid.projects.ssg.loss import group_pairs, positional_triplet
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings, FeatureTokens, PseudoLabels

PARTS = ("upper", "lower")


def labels_of(whole: Tensor, upper: Tensor, lower: Tensor) -> PseudoLabels:
    labels = PseudoLabels.from_clusters(whole)
    return replace(labels, side={"upper": upper, "lower": lower})


def batch_of(count: int) -> Batch:
    return Batch.of(torch.empty(count, 0))


def embeddings(embedding: Tensor, whole: Tensor, upper: Tensor, lower: Tensor) -> Embeddings:
    pre = torch.stack((whole, upper, lower), 1)
    post = torch.stack((embedding, upper, lower), 1)
    return Embeddings(pre, post, pre, whole)


@pytest.mark.oracle
def test_losses_and_gradients_are_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("ssg_loss*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        margin, size = float(a["margin"]), int(a["num_instances"])
        for step in range(3):
            given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"step{step}.")}
            loss = SSGLoss(2, margin, size)
            count = len(given["label_whole"])
            loss.set_labels(labels_of(*(given[f"label_{n}"] for n in ("whole", *PARTS))), None)
            features = {
                name: given[name].double().requires_grad_()
                for name in ("embedding", "whole", *PARTS)
            }
            found = loss(embeddings(*features.values()), batch_of(count))
            assert found.keys() == features.keys()
            total = torch.stack([*found.values()]).sum()
            total.backward()
            assert float(total.detach()) == pytest.approx(float(given["loss"]), abs=1e-5)
            for name, feature in features.items():
                assert float(found[name].detach()) == pytest.approx(
                    float(given[f"loss_{name}"]), abs=1e-5
                )
                grad, expected = feature.grad, given[f"grad_{name}"]
                assert grad is not None
                largest = float(expected.abs().max())
                torch.testing.assert_close(
                    grad.float(), expected, rtol=0, atol=1e-4 * largest, msg=f"{path} {step} {name}"
                )


def by_hand(feature: Tensor, label: list[int], size: int, margin: float) -> float:
    """The words of the specification, pair by pair."""
    terms = []
    for start in range(0, len(label), size):
        for j in range(start, start + size):
            foreign = [n for n in range(len(label)) if label[n] != label[j]]
            if not foreign:
                continue
            nearest = min(float((feature[j] - feature[n]).norm()) for n in foreign)
            for q in range(j + 1, start + size):
                away = float((feature[j] - feature[q]).norm())
                terms.append(max(0.0, away - nearest + margin))
    return sum(terms) / len(terms) if terms else 0.0


def random_features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "label",
    [
        [0, 0, 0, 1, 1, 1],
        [0, 1, 2, 0, 1, 2],  # positives whose labels differ
        [0, 0, 0, 0, 0, 1],  # nearly no negatives
    ],
)
def test_pairs_by_hand(label: list[int]) -> None:
    feature, whole = random_features(6), torch.tensor([7, 7, 7, 8, 8, 8])
    found = positional_triplet(feature, torch.tensor(label), group_pairs(whole, 3), 2.0)
    assert float(found) == pytest.approx(by_hand(feature, label, 3, 2.0))


def test_positives_by_label() -> None:
    """Published: halves of different people are pulled together if their wholes are clustered."""
    feature, whole = random_features(6), torch.tensor([7, 7, 7, 8, 8, 8])
    label = torch.tensor([0, 0, 1, 1, 1, 1])
    pairs = group_pairs(whole, 3)
    found = positional_triplet(feature, label, pairs, 2.0, same=True)
    terms = []
    for j, q in ((0, 1), (3, 4), (3, 5), (4, 5)):
        foreign = feature[label != label[j]]
        nearest = float((foreign - feature[j]).norm(dim=1).min())
        terms.append(max(0.0, float((feature[j] - feature[q]).norm()) - nearest + 2))
    assert float(found) == pytest.approx(sum(terms) / 4)
    features = [random_features(6, seed) for seed in range(4)]
    losses = []
    for positives in ("position", "label"):
        loss = SSGLoss(2, images_per_identity=3, positives=positives)  # type: ignore[arg-type]
        loss.set_labels(labels_of(whole, label, whole), None)
        losses.append(loss(embeddings(*features), batch_of(6)))
    assert losses[0]["upper"] != losses[1]["upper"]
    assert all(losses[0][name] == losses[1][name] for name in ("embedding", "whole", "lower"))


def test_an_anchor_whose_label_all_others_share_has_no_term() -> None:
    """The published code takes the minimum over nothing: an error."""
    feature = random_features(6).requires_grad_()
    whole = torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = group_pairs(whole, 3)
    shared = positional_triplet(feature, torch.zeros(6).long(), pairs, 2.0)
    shared.backward()
    assert float(shared.detach()) == 0
    assert feature.grad is not None
    assert not feature.grad.any()
    alone = positional_triplet(feature, torch.tensor([0, 0, 0, 0, 0, 0]).long(), pairs, 2.0)
    assert float(alone.detach()) == 0


def test_the_same_image_twice_in_a_group() -> None:
    feature = random_features(4)
    feature[1] = feature[0]
    feature.requires_grad_()
    whole = torch.tensor([0, 0, 1, 1])
    loss = positional_triplet(feature, whole, group_pairs(whole, 2), 9.0)
    loss.backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all())
    assert float(loss.detach()) == pytest.approx(by_hand(feature.detach(), [0, 0, 1, 1], 2, 9.0))


def test_a_batch_that_mixes_clusters_in_a_group() -> None:
    """Published: images of different clusters are pulled together, in silence."""
    whole = torch.tensor([0, 0, 1, 1, 1, 2])
    one, other, same = group_pairs(whole, 3)
    assert [*zip(one.tolist(), other.tolist(), strict=True)] == [
        (0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5),
    ]  # fmt: skip
    assert same.tolist() == [True, False, False, True, False, False]
    loss = SSGLoss(2, images_per_identity=4)
    loss.set_labels(labels_of(whole, whole, whole), None)
    feature = random_features(6)
    with pytest.raises(ValueError, match="groups of 4 images of one cluster, got 6 images"):
        loss(embeddings(*[feature] * 4), batch_of(6))


def test_half_precision_does_not_reach_the_distances() -> None:
    whole = torch.arange(4).repeat_interleave(4)
    loss = SSGLoss(2)
    loss.set_labels(labels_of(whole, whole % 2, whole), None)
    features = [random_features(16, seed).float() for seed in range(4)]
    expected = loss(embeddings(*features), batch_of(16))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(embeddings(*features), batch_of(16))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_labels_and_options_that_do_not_fit() -> None:
    loss = SSGLoss(2)
    with pytest.raises(ValueError, match="no clusters by upper, lower; set the clusterer Bank"):
        loss.set_labels(PseudoLabels.from_clusters(torch.arange(3)), None)
    with pytest.raises(ValueError, match="needs a head with parts"):
        SSGLoss(0)
    with pytest.raises(ValueError, match="each of the model's 3 parts"):
        SSGLoss(3)
    with pytest.raises(ValueError, match="images_per_identity of 2 or more"):
        SSGLoss(2, images_per_identity=1)


class Map(nn.Module):
    """A backbone that gives the image itself as a map, and its mean as the whole token."""

    embed_dim = 3

    def forward(self, batch: Batch) -> FeatureTokens:
        tokens = batch.image.flatten(2).transpose(1, 2)
        height, width = batch.image.shape[2:]
        return FeatureTokens(torch.cat((tokens.mean(1, keepdim=True), tokens), 1), (height, width))


def skewed_images() -> Tensor:
    """Images (5, 3, 8, 4) whose mirror images have other features."""
    return torch.rand(5, 3, 8, 4, generator=torch.Generator().manual_seed(0))


def test_banks_of_the_head() -> None:
    backbone = Map()
    model = ReIDModel(backbone, SelfSimilarityHead(backbone))
    image = skewed_images()
    model.train()
    given = model(Batch.of(image))
    whole, upper, lower = image.mean((2, 3)), image[:, :, :4].mean((2, 3)), image[:, :, 4:]
    torch.testing.assert_close(given.pre, torch.stack((whole, upper, lower.mean((2, 3))), 1))
    head = model.head
    assert isinstance(head, SelfSimilarityHead)
    mapped = whole @ head.embedding.weight.T
    normal = (mapped - mapped.mean(0)) / (mapped.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(given.post[:, 0], normal.clamp(min=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(given.post[:, 1:], given.pre[:, 1:])
    assert head.neck.bias.requires_grad
    torch.testing.assert_close(given.unit.norm(dim=2), torch.ones(5, 3))
    expected = nn.functional.normalize(given.pre.flatten(1), dim=1)
    torch.testing.assert_close(given.test, expected)
    alone = model(Batch.of(image[:1]))  # a training batch of one image has no variance
    assert bool(torch.isfinite(alone.post).all())


class Skewed(Map):
    """A map that is not symmetric: columns weigh differently."""

    def forward(self, batch: Batch) -> FeatureTokens:
        weights = torch.linspace(0.1, 2, batch.image.shape[3])
        return super().forward(batch._replace(image=(batch.image * weights) ** 2))


def test_features_of_image_and_mirror_image_are_added_before_they_are_normalised() -> None:
    backbone = Skewed()
    model = ReIDModel(backbone, SelfSimilarityHead(backbone))
    plain = ReIDModel(backbone, SelfSimilarityHead(backbone, mirror=False))
    image = skewed_images()
    plain.eval()
    g, flipped = plain(Batch.of(image)).pre, plain(Batch.of(image.flip(3))).pre
    assert not torch.allclose(g, flipped, atol=1e-2)
    found = model.eval()(Batch.of(image))
    torch.testing.assert_close(found.unit, nn.functional.normalize(g + flipped, dim=2))
    both = (g + flipped).flatten(1)
    torch.testing.assert_close(found.test, nn.functional.normalize(both, dim=1))
    torch.testing.assert_close(model.train()(Batch.of(image)).pre, g)


def test_stripes_of_a_map_with_too_few_rows() -> None:
    backbone = Map()
    model = ReIDModel(backbone, SelfSimilarityHead(backbone))
    with pytest.raises(ConfigError, match="num_stripes: expected at most 1"):
        model(Batch.of(torch.rand(2, 3, 1, 4)))


def test_every_cluster_once_in_each_pass() -> None:
    sizes = [5, 4, 3, 9, 4, 4, 6]
    cluster = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    labels = PseudoLabels.from_clusters(cluster)
    sampler = PassSampler(12, 4, passes=3)
    sampler.set_labels(labels)
    assert len(sampler) == 6, "two batches of three clusters a pass; the seventh is left out"
    batches = [[draw.index for draw in batch] for batch in sampler]
    assert len(batches) == 6
    for number in range(3):
        seen = [int(c) for b in batches[2 * number : 2 * number + 2] for c in cluster[b][::4]]
        assert len(set(seen)) == 6
    for batch in batches:
        for start in range(0, 12, 4):
            group = batch[start : start + 4]
            assert len(set(cluster[group].tolist())) == 1
            if sizes[int(cluster[group[0]])] >= 4:
                assert len(set(group)) == 4
    assert isinstance(sampler, PKSampler)


def test_fewer_clusters_than_a_batch_takes() -> None:
    """The published loader is empty then, and the round trains nothing."""
    sampler = PassSampler(16, 4, passes=2)
    sampler.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 1, 1, -1])))
    batches = [[draw.index for draw in batch] for batch in sampler]
    assert [len(batch) for batch in batches] == [16, 16]
    assert 5 not in {index for batch in batches for index in batch}
    with pytest.raises(ValueError, match="passes: expected 1 or more"):
        PassSampler(16, 4, passes=0)
