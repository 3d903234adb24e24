"""Draws the last clusters after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reid import distributed
from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.engine.trainer import Trainer
from reid.pictures.sheets import draw_clusters
from reid.registry import Hook
from reid.structures import ImageRecord


class DrawClusters(Hook):
    """Draws a contact sheet of the last clusters after training, to clusters.png and TensorBoard.

    Args:
        labels: The hook that knows the clusters.
        records: The training images.
        output_dir: clusters.png is written here.
        writer: Shows the picture in TensorBoard.
        rows: Number of clusters to draw.
    """

    def __init__(
        self,
        labels: RefreshPseudoLabels,
        records: Sequence[ImageRecord],
        output_dir: Path,
        writer: MetricWriter,
        rows: int,
    ) -> None:
        self._labels = labels
        self._records = records
        self._output_dir = output_dir
        self._writer = writer
        self._rows = rows

    def after_train(self, trainer: Trainer) -> None:
        """Draws the picture, on the main process."""
        clusters = self._labels.last_clusters
        if clusters is None or not distributed.is_main():
            return
        path = self._output_dir / "clusters.png"
        draw_clusters(path, clusters, self._records, rows=self._rows)
        self._writer.write_image("pictures/clusters", path, trainer.step)
