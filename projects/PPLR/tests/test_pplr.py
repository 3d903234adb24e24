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
from reid.modeling.heads import StripeHead
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


def labels_of(cluster: Tensor, proxy_cluster: Tensor, proxy_camid: Tensor, camid: Tensor,
              index: Tensor, count: int) -> PseudoLabels:  # fmt: skip
    """Labels of a batch's images, then of one more image for each proxy."""
    own = torch.full((count,), -1)
    cameras = own.clone()
    own[index], cameras[index] = cluster, camid
    labels = PseudoLabels.from_clusters(
        torch.cat((own, proxy_cluster)), torch.cat((cameras, proxy_camid))
    )
    assert torch.equal(labels.proxy_to_cluster, proxy_cluster)
    assert torch.equal(labels.proxy_to_camera, proxy_camid)
    return labels


@pytest.mark.oracle
def test_losses_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path in files(oracle_dir):
        a = arrays(path)
        count = int(a["num_class"])
        for step in range(3):
            given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"step{step}.")}
            index, target = given["index"], given["label"]
            leaves = {name: given[name].requires_grad_() for name in ("feature", "logit", "logit_part")}
            logits, parts = leaves["logit"][:, :count], leaves["logit_part"][:, :count]
            parts, agreement = parts.permute(2, 0, 1), a["agreement"][index]
            losses = {"global_loss": part_guided(logits, parts, target, agreement, float(a["beta"]))}
            if given["epoch"] >= 5:
                losses["part_loss"] = agreement_smoothed(parts, target, agreement)
            else:
                each = [smoothed_cross_entropy(part, target, float(a["smoothing"])) for part in parts]
                losses["part_loss"] = torch.stack(each).mean()
            triplet = Triplet(feature="after")
            labels = torch.full((len(a["agreement"]),), -1)
            labels[index] = target
            triplet.cluster = labels
            seen = embeddings_of(leaves["feature"][:, None])
            losses |= {"triplet_loss": triplet(seen, Batch.of(index, index=index))["triplet"]}
            total = torch.stack([*losses.values()]).sum()
            if "camid" in given:
                leaves["feature_part"] = given["feature_part"].requires_grad_()
                camera = camera_loss(a, given, leaves)
                losses["camera_loss"] = camera
                total = total + a["camera_weight"] * camera
            total.backward()
            for name, value in (*losses.items(), ("loss", total)):
                close(value, given[name], 1e-6, f"{path} {step} {name}")
            for name, leaf in leaves.items():
                close_gradient(leaf.grad, given[f"grad_{name}"], f"{path} {step} {name}")


def camera_loss(a: dict[str, Tensor], given: dict[str, Tensor], leaves: dict[str, Tensor],
                negatives: int = 0) -> Tensor:  # fmt: skip
    index = given["index"]
    loss = PPLRCameraLoss(float(a["temperature"]), negatives or int(a["neg_k"]))
    labels = labels_of(
        given["label"], a["proxy_cluster"], a["proxy_camid"], given["camid"], index,
        len(a["agreement"]),
    )  # fmt: skip
    proxies = torch.cat((a["proxy"][..., None], a["proxy_part"]), 2).permute(0, 2, 1)
    unit = proxies.new_zeros(len(labels), *proxies.shape[1:])
    unit[-len(proxies) :] = proxies  # the rows become these, since the batch's images add 0
    loss.set_labels(labels, FeatureSet.of(unit[:, 0], unit=unit))
    feature = torch.cat((leaves["feature"][..., None], leaves["feature_part"]), 2)
    seen = embeddings_of(feature.permute(0, 2, 1))
    before = loss.memory.rows.clone()
    found = loss(seen, Batch.of(index, index=index))
    loss.commit(seen, Batch.of(index, index=index))
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
        head = StripeHead(backbone, count)
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
        logits = torch.stack([c(bank) for c, bank in zip(classifiers, post.unbind(1), strict=True)], 2)
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
