from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.evaluation.extract import ImageSet
from reid.labelling import Clusters
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, PseudoLabels

RECORDS = [ImageRecord(f"{i}.jpg", i // 2, i % 2) for i in range(6)]


class Echo(nn.Module):
    def forward(self, batch: Batch) -> Embeddings:
        feature = nn.functional.normalize(batch.image[:, :2, 0, 0], dim=1)
        return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


class Taker:
    """Stands for sampler and criterion; stores what it receives."""

    needs_features = True

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None = None) -> None:
        self.labels, self.features = labels, features


def test_unreadable_images_are_in_no_cluster(tmp_path: Any) -> None:
    asked: list[FeatureSet] = []

    def clusterer(features: FeatureSet, progress: Any = None) -> PseudoLabels:
        asked.append(features)
        return PseudoLabels.from_clusters(torch.tensor([1, 1, 0, -1]), features.camids)

    read = torch.tensor([5, 0, 3, 2])  # 1 and 4 are missing
    image = (read + 1.0)[:, None, None, None].expand(-1, 3, 2, 2)
    images = ImageSet("train", RECORDS, [Batch.of(image, read % 2, read)], allow_missing=True)
    sampler, criterion, writer = Taker(), Taker(), MetricWriter(tmp_path)
    hook = RefreshPseudoLabels(
        Clusters(clusterer), images, sampler, criterion, writer,  # type: ignore[arg-type]
    )  # fmt: skip
    writer.start()
    cpu = torch.device("cpu")
    trainer: Any = SimpleNamespace(inference_model=Echo(), device=cpu, epoch=0, step=0)
    hook.before_epoch(trainer)
    writer.close()
    assert asked[0].pids.tolist() == [0, 1, 1, 2]
    assert asked[0].test.any(1).all()
    assert sampler.labels.cluster.tolist() == [1, -1, 1, 0, -1, -1]
    assert criterion.labels.proxy.tolist() == sampler.labels.proxy.tolist()
    assert len(criterion.features) == 6
    assert not criterion.features.test[[1, 4]].any()
