"""After training, a picture of the last clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reid import distributed
from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.logs import MetricWriter
from reid.engine.trainer import Trainer
from reid.pictures.sheets import draw_clusters
from reid.registry import Hook
from reid.structures import ImageRecord


class DrawClusters(Hook):
    """After training, a contact sheet of the last clusters, as clusters.png and in TensorBoard.

    Args:
        labels: Knows the clusters.
        records: The training images.
        output_dir: Where to.
        writer: Gets the picture.
        rows: Clusters to draw.
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
        """Draws, on the main process."""
        clusters = self._labels.last_clusters
        if clusters is None or not distributed.is_main():
            return
        path = self._output_dir / "clusters.png"
        draw_clusters(path, clusters, self._records, rows=self._rows)
        self._writer.write_image("pictures/clusters", path, trainer.step)
