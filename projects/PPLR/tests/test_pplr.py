"""PPLR: the published numbers, data on which the published code fails, settings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.config import load_config
from reid.modeling.classifiers import ClusterClassifier
from reid.modeling.heads import BNNeckStripeHead
from reid.modeling.losses import Triplet, smoothed_cross_entropy
from reid.projects.pplr import PPLRCameraLoss, PPLRLoss
from reid.projects.pplr.loss import agreement_smoothed, cross_agreement, part_guided
from reid.structures import Batch, Embeddings, FeatureSet, FeatureTokens, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("agreement", "head")  # other files that match pplr_*.npz hold losses


def arrays(path: Path) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    return {
        name: value.double() if value.is_floating_point() else value.long()
        for name, value in found.items()
    }


def files(folder: Path, *kinds: str) -> list[Path]:
    """The oracle files of some kinds; without any, those of the losses."""
    other = [path for path in sorted(folder.glob("pplr_*.npz"))
             if any(f"pplr_{kind}" in path.name for kind in (kinds or KINDS))]  # fmt: skip
    found = other if kinds else sorted({*folder.glob("pplr_*.npz")} - {*other})
    assert found
    return found


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Agrees to a share of the larger of 1 and the array's largest entry."""
    error = (found.detach() - expected).abs().max() / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {float(error)}"


def close_gradient(found: Tensor | None, expected: Tensor, what: str) -> None:
    assert found is not None
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"{what}: {float(error)}"


def embeddings_of(feature: Tensor) -> Embeddings:
    """Features after the neck (B, 1 + K, D) as embeddings."""
    unit = F.normalize(feature, dim=2)
    return Embeddings(feature, feature, unit, unit[:, 0])


def labels_of(given: dict[str, Tensor], a: dict[str, Tensor]) -> PseudoLabels:
    """Labels of a batch's images, then of one more image for each proxy."""
    labels = PseudoLabels.from_clusters(
        torch.cat((given["label"], a["proxy_cluster"])),
        torch.cat((given["camid"], a["proxy_camid"])),
    )
    assert torch.equal(labels.proxy_to_cluster, a["proxy_cluster"])
    assert torch.equal(labels.proxy_to_camera, a["proxy_camid"])
    return labels


@pytest.mark.oracle
def test_losses_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path in files(oracle_dir):
        a = arrays(path)
        count = int(a["num_class"])
        for step in range(3):
            given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"step{step}.")}
            index, target = given["index"], given["label"]
            leaves = {
                name: given[name].requires_grad_() for name in ("feature", "logit", "logit_part")
            }
            logits, parts = leaves["logit"][:, :count], leaves["logit_part"][:, :count]
            parts, agreement = parts.permute(2, 0, 1), a["agreement"][index]
            losses = {
                "global_loss": part_guided(logits, parts, target, agreement, float(a["beta"]))
            }
            if given["epoch"] >= 5:
                losses["part_loss"] = agreement_smoothed(parts, target, agreement)
            else:
                each = [
                    smoothed_cross_entropy(part, target, float(a["smoothing"])) for part in parts
                ]
                losses["part_loss"] = torch.stack(each).mean()
            triplet = Triplet(feature="after")
            triplet.cluster = target
            seen = embeddings_of(leaves["feature"][:, None])
            losses |= {"triplet_loss": triplet(seen, Batch.of(target))["triplet"]}
            total = torch.stack([*losses.values()]).sum()
            if "camid" in given:
                leaves["feature_part"] = given["feature_part"].requires_grad_()
                camera = camera_loss(a, given, leaves)
                losses["camera_loss"] = camera
                total = total + a["camera_weight"] * camera
            total.backward()
            for name, value in (*losses.items(), ("loss", total)):
                close(value, given[name], 1e-5, f"{path} {step} {name}")
            for name, leaf in leaves.items():
                close_gradient(leaf.grad, given[f"grad_{name}"], f"{path} {step} {name}")


def camera_loss(
    a: dict[str, Tensor], given: dict[str, Tensor], leaves: dict[str, Tensor], negatives: int = 0
) -> Tensor:
    loss = PPLRCameraLoss(float(a["temperature"]), negatives or int(a["neg_k"]))
    labels = labels_of(given, a)
    proxies = torch.cat((a["proxy"][..., None], a["proxy_part"]), 2).permute(0, 2, 1)
    unit = proxies.new_zeros(len(labels), *proxies.shape[1:])
    unit[-len(proxies) :] = proxies  # the rows become these, since the batch's images add 0
    loss.set_labels(labels, FeatureSet.of(unit[:, 0], unit=unit))
    feature = torch.cat((leaves["feature"][..., None], leaves["feature_part"]), 2)
    seen = embeddings_of(feature.permute(0, 2, 1)), Batch.of(given["label"])
    before = loss.memory.rows.clone()
    found = loss(*seen)
    loss.commit(*seen)
    assert torch.equal(loss.memory.rows, before), "proxies stay fixed during the epoch"
    return found["global_camera"] + found["part_camera"]


@pytest.mark.oracle
def test_fewer_negatives_than_asked_for(oracle_dir: Path) -> None:
    a = arrays(oracle_dir / "pplr_camera.npz")
    given = {k.split(".")[1]: v for k, v in a.items() if k.startswith("step0.")}
    found = camera_loss(a, given, given, negatives=200)  # 103 proxies
    assert float(found) == pytest.approx(2.6437, abs=1e-4)  # the published code: 3.7725


@pytest.mark.oracle
def test_agreement_classifiers_and_proxies_of_the_authors(oracle_dir: Path) -> None:
    for path in files(oracle_dir, "agreement"):
        a = arrays(path)
        unit = torch.cat((a["feature"][..., None], a["feature_part"]), 2).permute(0, 2, 1)
        features = FeatureSet.of(unit[:, 0], camids=a["camid"], unit=unit)
        assert (cross_agreement(features, int(a["k"])) - a["agreement"]).abs().max() < 1e-6
        labels = PseudoLabels.from_clusters(a["cluster_label"], a["camid"])
        loss = PPLRLoss(unit.shape[2], 3, int(a["k"])).double()
        loss.set_labels(labels, features)
        assert torch.equal(loss.agreement, cross_agreement(features, int(a["k"])).double())
        rows = torch.stack([part.weight.detach() for part in loss.classifiers], 2)  # type: ignore[misc]
        close(rows[..., 0], a["classifier"], 1e-6, f"{path} classifier")
        close(rows[..., 1:], a["classifier_part"], 1e-6, f"{path} part classifiers")
        camera = PPLRCameraLoss()
        camera.set_labels(labels, features)
        assert torch.equal(labels.proxy_to_cluster, a["proxy_cluster"])
        assert torch.equal(labels.proxy_to_camera, a["proxy_camid"])
        proxies = camera.memory.rows.permute(1, 2, 0)
        close(proxies[..., 0], a["proxy"], 1e-6, f"{path} proxies")
        close(proxies[..., 1:], a["proxy_part"], 1e-6, f"{path} part proxies")


class Backbone(nn.Module):
    embed_dim = 24


@pytest.mark.oracle
def test_the_head_of_the_authors(oracle_dir: Path) -> None:
    for path in files(oracle_dir, "head"):
        a = arrays(path)
        count = len([name for name in a if name.startswith("state.classifier")]) - 1
        backbone = Backbone()
        backbone.embed_dim = a["map"].shape[1]
        head = BNNeckStripeHead(backbone, count)
        necks = {"bnneck": head.neck} | {f"bnneck{j}": n for j, n in enumerate(head.part_necks)}
        for name, neck in necks.items():
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(neck, key).data.copy_(a[f"state.{name}.{key}"])
        classifiers = []
        for name in ("classifier", *(f"classifier{j}" for j in range(count))):
            classifier = ClusterClassifier(backbone.embed_dim)
            classifier.weight.data = a[f"state.{name}.weight"].float()
            classifiers.append(classifier)
        image = a["map"].float().requires_grad_()
        whole = image.mean((2, 3))[:, None]
        tokens = torch.cat((whole, image.flatten(2).transpose(1, 2)), 1)
        features = FeatureTokens(tokens, (image.shape[2], image.shape[3]))
        found = head.eval()(features, Batch.of(image))
        close(found.test, a["eval_test_feature"], 1e-5, f"{path} test")
        close(found.unit[:, 0], a["eval_feature"], 1e-5, f"{path} eval")
        close(found.unit[:, 1:].transpose(1, 2), a["eval_feature_part"], 1e-5, f"{path} parts")
        post = head.train()(features, Batch.of(image)).post
        logits = torch.stack(
            [c(bank) for c, bank in zip(classifiers, post.unbind(1), strict=True)], 2
        )
        outputs = {
            "feature": post[:, 0], "feature_part": post[:, 1:].transpose(1, 2),
            "logit": logits[..., 0], "logit_part": logits[..., 1:],
        }  # fmt: skip
        for name, output in outputs.items():
            close(output, a[f"train_{name}"], 1e-5, f"{path} {name}")
        sum((output * a[f"grad_out_{name}"]).sum() for name, output in outputs.items()).backward()  # type: ignore[union-attr]
        close_gradient(image.grad, a["grad_map"], f"{path} map")
        for name, neck in necks.items():
            for key in ("running_mean", "running_var"):
                close(getattr(neck, key), a[f"after.{name}.{key}"], 1e-5, f"{path} {name} {key}")


def problem(
    proxies_of: list[tuple[int, int]], images: int = 3, parts: int = 2
) -> tuple[PseudoLabels, FeatureSet]:
    """Images of proxies given as (cluster, camera); cluster -1 = outliers."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([c for c, _ in proxies_of]).repeat_interleave(images)
    camids = torch.tensor([c for _, c in proxies_of]).repeat_interleave(images)
    unit = F.normalize(torch.randn(len(cluster), 1 + parts, 8, generator=generator), dim=2)
    features = FeatureSet.of(unit[:, 0], camids=camids, unit=unit)
    return PseudoLabels.from_clusters(cluster, camids), features


def stepped(loss: PPLRLoss | PPLRCameraLoss, index: Tensor, parts: int = 2) -> dict[str, Tensor]:
    """The losses of random features for some images; their gradient is checked to be finite."""
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(len(index), 1 + parts, 8, generator=generator).requires_grad_()
    found = loss(embeddings_of(feature), Batch.of(index, index=index))
    torch.stack([*found.values()]).sum().backward()
    assert feature.grad is not None
    assert torch.isfinite(feature.grad).all()
    assert all(torch.isfinite(value) for value in found.values())
    return {name: value.detach() for name, value in found.items()}


def plain_camera_loss(f: Tensor, y: int, bank: Tensor, labels: PseudoLabels) -> Tensor:
    """The camera term of one sample in one space, as the paper writes it."""
    z = bank @ f / 0.07
    same = labels.proxy_to_cluster == labels.proxy_to_cluster[y]
    others = same & (labels.proxy_to_camera != labels.proxy_to_camera[y])
    if not others.any():
        return torch.zeros(())
    hardest = z[~same].sort(descending=True).values[:50]
    return torch.logsumexp(torch.cat((z[others], hardest)), 0) - z[others].mean()


@pytest.mark.parametrize(
    ("proxies_of", "what"),
    [
        ([(c, k) for c in range(30) for k in range(3)], "more than 50 negatives"),
        ([(c, k) for c in range(4) for k in range(3)], "fewer than 50 negatives"),
        ([(c, k) for c in range(4) for k in (2, 7, 12)], "camera ids with gaps"),
        ([(0, 0), (0, 1), (0, 3)], "one cluster"),
        ([(0, 0), (1, 0), (1, 2), (-1, 1), (-1, 4)], "a cluster of one camera, outliers"),
    ],
)
def test_the_camera_term_is_the_definition(proxies_of: list[tuple[int, int]], what: str) -> None:
    labels, features = problem(proxies_of)
    loss = PPLRCameraLoss()
    loss.set_labels(labels, features)
    index = (labels.cluster >= 0).nonzero()[::2, 0]
    found = stepped(loss, index)
    feature = torch.randn(len(index), 3, 8, generator=torch.Generator().manual_seed(1))
    unit = F.normalize(feature, dim=2)
    expected = torch.stack([
        torch.stack([plain_camera_loss(f, y, bank, labels)
                     for f, bank in zip(sample, loss.memory.rows, strict=True)])
        for sample, y in zip(unit, labels.proxy[index].tolist(), strict=True)
    ]).mean(0)  # fmt: skip
    torch.testing.assert_close(found["global_camera"], expected[0], msg=what)
    torch.testing.assert_close(found["part_camera"], expected[1:].mean(), msg=what)


@pytest.mark.parametrize("camera", [0, -1])
def test_every_cluster_in_one_camera_has_no_camera_term(camera: int) -> None:
    labels, features = problem([(c, camera) for c in range(5)])
    loss = PPLRCameraLoss()
    loss.set_labels(labels, features)
    assert stepped(loss, torch.arange(15)) == {"global_camera": 0, "part_camera": 0}


def test_losses_are_the_definition_through_the_whole_loss() -> None:
    labels, features = problem([(c, k) for c in range(5) for k in range(2)])
    loss = PPLRLoss(8, 2, neighbors=4)
    loss.set_labels(labels, features)
    index = torch.arange(0, 30, 3)
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(len(index), 3, 8, generator=generator)
    rows = [part.weight.detach() for part in loss.classifiers]  # type: ignore[misc]
    p = torch.stack([(feature[:, m] @ rows[m].T).softmax(1) for m in range(3)])  # (3, B, C)
    y, agreement = labels.cluster[index], loss.agreement[index]
    assert agreement.unique().numel() > 2
    q = sum(agreement.softmax(1)[:, m, None] * p[1 + m] for m in range(2))
    onehot = F.one_hot(y, 5)
    expected = -((0.5 * onehot + 0.5 * q) * p[0].log()).sum(1).mean()
    early = -((0.9 * onehot + 0.1 / 5) * p[1:].log()).sum(2).mean()
    divergence = (0.2 * (math.log(0.2) - p[1:].log())).sum(2)
    cross = -(onehot * p[1:].log()).sum(2)
    late = (agreement.T * cross + (1 - agreement.T) * divergence).mean()
    for epoch, part in ((0, early), (4, early), (5, late)):
        loss.epoch = epoch
        found = stepped(loss, index)
        torch.testing.assert_close(found["global_refined"], expected)
        torch.testing.assert_close(found["part_smoothed"], part)


def test_the_global_loss_sends_no_gradient_to_the_parts() -> None:
    logits, parts = torch.randn(4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    part_guided(logits, parts, torch.arange(4), torch.rand(4, 2), 0.5).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert parts.grad is None


def test_images_without_a_label_do_not_count() -> None:
    logits, parts, agreement = torch.randn(4, 6), torch.randn(2, 4, 6), torch.rand(4, 2)
    target = torch.tensor([3, -1, 0, -1])
    some = [0, 2]
    for found, expected in (
        (part_guided(logits, parts, target, agreement, 0.5),
         part_guided(logits[some], parts[:, some], target[some], agreement[some], 0.5)),
        (agreement_smoothed(parts, target, agreement),
         agreement_smoothed(parts[:, some], target[some], agreement[some])),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected)
    assert not agreement_smoothed(parts, torch.full((4,), -1), agreement).any()


def test_losses_are_in_single_precision_under_autocast() -> None:
    labels, features = problem([(c, k) for c in range(5) for k in range(2)])
    losses = (PPLRLoss(8, 2, neighbors=4, agreement_from_epoch=0), PPLRCameraLoss())
    for loss in losses:
        loss.set_labels(labels, features)
        plain = stepped(loss, torch.arange(30))
        with torch.autocast("cpu", torch.bfloat16):
            assert stepped(loss, torch.arange(30)) == plain


def test_more_clusters_than_the_published_classifier_has_rows() -> None:
    clusters = 3200  # published: 3000
    unit = F.normalize(
        torch.randn(clusters, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2
    )
    loss = PPLRLoss(4, 1)
    labels = PseudoLabels.from_clusters(torch.arange(clusters))
    loss.set_labels(labels, FeatureSet.of(unit[:, 0], unit=unit))
    assert [part.weight.shape for part in loss.classifiers] == [(clusters, 4)] * 2
    feature = unit[-8:]
    index = torch.arange(clusters)[-8:]
    assert torch.isfinite(
        loss(embeddings_of(feature), Batch.of(index, index=index))["part_smoothed"]
    )


def test_duplicates_are_neighbours_of_each_other() -> None:
    unit = torch.eye(4)[[0, 0, 0, 1, 2, 3]][:, None].repeat(1, 2, 1)
    # The part sees image 3 near image 0; by the whole image, 1 and 2 are the nearest of 0.
    unit[:, 1] = torch.eye(4)[[0, 1, 2, 0, 1, 2]]
    agreement = cross_agreement(FeatureSet.of(unit[:, 0], unit=unit), 1)
    assert agreement[0].item() == 0.0  # itself left out: {1} against {3}
    assert agreement.shape == (6, 1)


@pytest.mark.parametrize(("images", "expected"), [(2, 1.0), (5, 1.0)])
def test_fewer_images_than_neighbours(images: int, expected: float) -> None:
    unit = F.normalize(torch.randn(images, 3, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    agreement = cross_agreement(FeatureSet.of(unit[:, 0], unit=unit), 20)
    assert agreement.tolist() == [[expected] * 2] * images  # all the others, in both spaces


def test_images_that_could_not_be_read_are_no_neighbours() -> None:
    _, features = problem([(c, 0) for c in range(6)])
    present = torch.ones(18, dtype=torch.bool)
    present[[2, 9]] = False
    unit = features.unit.clone()
    unit[~present] = 0
    found = cross_agreement(FeatureSet.of(unit[:, 0], unit=unit, present=present), 4)
    expected = cross_agreement(FeatureSet.of(unit[present, 0], unit=unit[present]), 4)
    assert torch.equal(found[present], expected)
    assert not found[~present].any()


def test_one_cluster() -> None:
    labels, features = problem([(0, 0), (0, 1), (-1, 2)])
    for epoch in (0, 5):
        loss = PPLRLoss(8, 2)
        loss.epoch = epoch
        loss.set_labels(labels, features)
        found = stepped(loss, torch.arange(6))
        assert found == {"global_refined": 0, "part_smoothed": 0}


def test_what_is_refused() -> None:
    labels, features = problem([(0, 0), (1, 0)])
    with pytest.raises(ValueError, match="needs a head with parts, such as BNNeckStripeHead"):
        PPLRLoss(8, 0)
    with pytest.raises(ValueError, match="needs the features"):
        PPLRLoss(8, 2).set_labels(labels, None)
    with pytest.raises(ValueError, match="none of 6 images has a label"):
        PPLRLoss(8, 2).set_labels(PseudoLabels.from_clusters(torch.full((6,), -1)), features)
    for options in ({"neighbors": 0}, {"beta": 1.5}, {"smoothing": 1.0},
                    {"agreement_from_epoch": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=f"expected .*{next(iter(options))}"):
            PPLRLoss(8, 2, **options)  # type: ignore[arg-type]
    for options in ({"temperature": 0.0}, {"num_negatives": 0}, {"part_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PPLRCameraLoss(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "eps", "camera_weight"),
    [
        ("market", 0.4, 0.5), ("msmt", 0.6, 1.0), ("duke", 0.4, 0.5),
        ("market_blind", 0.5, None), ("msmt_blind", 0.5, None), ("duke_blind", 0.5, None),
    ],
)  # fmt: skip
def test_published_hyper_parameters(name: str, eps: float, camera_weight: float | None) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "CrossCameraSampler", "batch_size": 64, "images_per_identity": 4,
        "steps_per_epoch": 400,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "CameraProxyClusterer", "k1": 30, "k2": 6, "eps": eps, "min_samples": 4,
    }  # fmt: skip
    losses: list[dict[str, object]] = [
        {"name": "PPLRLoss", "neighbors": 20, "beta": 0.5, "smoothing": 0.1,
         "agreement_from_epoch": 5, "moments": "keep"},
        {"name": "Triplet", "margin": None, "feature": "after"},
        {"name": "PPLRCameraLoss", "weight": camera_weight, "temperature": 0.07,
         "num_negatives": 50},
    ]  # fmt: skip
    assert config.criterion == losses[: 2 if camera_weight is None else 3]
    assert config.model.head == {"name": "BNNeckStripeHead", "num_stripes": 3}
    assert config.model.bn_samples_per_group == 16
    assert config.model.backbone["last_stride"] == 1
    assert config.input.size == (384, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4], "fill": "raw_mean",
    }  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 0)
    assert (solver.gamma, solver.amp, solver.bias_lr_factor) == (0.1, "off", 1.0)
