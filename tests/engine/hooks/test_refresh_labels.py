from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.evaluation.extract import ImageSet
from reid.labelling import Clusters
from reid.modeling.losses import Criterion, Loss
from reid.modeling.memory_losses import InstanceLoss
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, PseudoLabels

RECORDS = [ImageRecord(f"{i}.jpg", i // 2, i % 2) for i in range(6)]


class Echo(nn.Module):
    def forward(self, batch: Batch) -> Embeddings:
        feature = nn.functional.normalize(batch.image[:, :2, 0, 0], dim=1)
        return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


class Taker:
    """Stands for sampler and criterion; stores what it receives."""

    needs_features = True

    def __iter__(self) -> Iterator[Loss]:
        return iter(())

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
    trainer: Any = SimpleNamespace(
        inference_model=Echo(), clustered_model=None, device=cpu, epoch=0, step=0
    )
    hook.before_epoch(trainer)
    writer.close()
    assert asked[0].pids.tolist() == [0, 1, 1, 2]
    assert asked[0].test.any(1).all()
    assert sampler.labels.cluster.tolist() == [1, -1, 1, 0, -1, -1]
    assert criterion.labels.proxy.tolist() == sampler.labels.proxy.tolist()
    assert len(criterion.features) == 6
    assert not criterion.features.test[[1, 4]].any()


def test_a_memory_that_lasts_is_clustered_in_place_of_new_features(tmp_path: Any) -> None:
    asked: list[FeatureSet] = []

    def clusterer(features: FeatureSet, progress: Any = None) -> PseudoLabels:
        asked.append(features)
        return PseudoLabels.from_clusters(torch.arange(len(features)) // 2, features.camids)

    def run(model: nn.Module, loss: InstanceLoss, state: dict[str, Any] | None, epoch: int) -> Any:
        images = ImageSet("train", RECORDS, [Batch.of(image, read % 2, read)], allow_missing=True)
        writer = MetricWriter(tmp_path)
        hook = RefreshPseudoLabels(
            Clusters(clusterer), images, Taker(), Criterion([loss]), writer,  # type: ignore[arg-type]
        )  # fmt: skip
        cpu = torch.device("cpu")
        trainer: Any = SimpleNamespace(
            inference_model=model, clustered_model=None, device=cpu, epoch=epoch, step=0
        )
        if state is not None:
            hook.check_state(state, trainer, epoch)
            hook.load_state_dict(state)
        writer.start()
        hook.before_epoch(trainer)
        writer.close()
        return hook

    read = torch.tensor([5, 0, 3, 2])  # 1 and 4 are missing
    image = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    loss = InstanceLoss(0.05, 0.2, 0.1)
    hook = run(Echo(), loss, None, 0)
    first = loss.memory.rows.clone()
    loss.memory.rows[0, 3] = torch.tensor([1.0, 0.0])
    state = hook.state_dict()

    class Refuses(nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            raise AssertionError("nothing may be extracted")

    other = InstanceLoss(0.05, 0.2, 0.1)
    run(Refuses(), other, state, 1)
    assert torch.equal(asked[0].test, first[0][[0, 2, 3, 5]])
    assert torch.equal(asked[1].test, loss.memory.rows[0][[0, 2, 3, 5]])
    assert asked[1].camids.tolist() == [0, 0, 1, 1]
    assert torch.equal(other.memory.rows, loss.memory.rows)
    assert other.row.tolist() == loss.row.tolist() == [0, -1, 2, 3, -1, 5]
    assert torch.equal(other.row_label, loss.row_label)

    fresh = InstanceLoss(0.05, 0.2, 0.1)
    good = state["memories"][0]
    for wrong, message in (
        ({}, "expected .*image_row, rows"),
        ({**good, "rows": good["rows"].double()}, "rows: expected"),
        ({**good, "image_row": good["image_row"][1:]}, "5 training images"),
        ({**good, "image_row": good["image_row"] + 5}, "from -1 to 5"),
        ({**good, "source_classes": torch.tensor(9)}, "source_classes"),
    ):
        with pytest.raises(ValueError, match=f"memories.*InstanceLoss.*{message}"):
            run(Refuses(), fresh, {**state, "memories": [wrong]}, 1)
    with pytest.raises(ValueError, match="memories: expected a list"):
        run(Refuses(), fresh, {**state, "memories": [good, good]}, 1)
