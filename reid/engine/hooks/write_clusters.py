"""Writes files after training without labels, so that a person can judge the clusters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from reid import distributed
from reid.engine.hooks.refresh_labels import number_text
from reid.engine.logs import progress_bar
from reid.engine.metrics import MetricWriter
from reid.engine.trainer import Trainer
from reid.evaluation.extract import ImageSet
from reid.evaluation.matches import (
    Match,
    camera_name,
    cluster_confidence,
    cross_camera_matches,
    write_clusters,
    write_matches,
)
from reid.labelling import ClusteringError, Labeller, cluster_statistics
from reid.pictures.sheets import draw_clusters, draw_pairs
from reid.registry import HOOK, ConfigError, Hook
from reid.structures import OUTLIER, FeatureSet, PseudoLabels

logger = logging.getLogger(__name__)

_PAIRS = 20


@HOOK.register()
class WriteClusters(Hook):
    """Clusters the training images with the final model, and writes files that show its quality.

    The files are `clusters.csv` (path, cluster, camera, confidence; see `cluster_confidence`),
    `clusters.png` (a row of images for each cluster), `matches.csv` and `matches.png` (the most
    similar pairs of images from different cameras). If the final model gives no cluster, a warning
    says so and every image is an outlier.

    Args:
        output_dir: The files are written here.
        images: The training images. Unreadable ones are outliers and appear in no match.
        labeller: The labeller of the training.
        writer: Shows the pictures in TensorBoard.
        num_clusters: Clusters in the picture, from the largest to the smallest in even steps; 0 =
            no picture.
        num_matches: Pairs across cameras in `matches.csv`; the picture shows the first 20.

    Raises:
        ConfigError: The labels are the identities, so there are no clusters.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        output_dir: Path,
        images: ImageSet,
        labeller: Labeller,
        writer: MetricWriter,
        num_clusters: int = 24,
        num_matches: int = 200,
    ) -> None:
        if labeller.fixed:
            raise ConfigError(
                "WriteClusters: expected a clusterer, but the labels are the identities; set "
                "CLUSTERER or remove this hook"
            )
        if labeller.uses_source:
            raise ConfigError(
                "WriteClusters: the clusterer compares with a source, whose images must not be "
                "among the matches; remove this hook, or set the clusterer's source_weight to 0"
            )
        if num_clusters < 0 or num_matches < 1:
            raise ValueError(
                "expected num_clusters of 0 or more and num_matches of 1 or more, got "
                f"{num_clusters}, {num_matches}"
            )
        self._output_dir = output_dir
        self._images = images
        self._records = images.records
        self._labeller = labeller
        self._writer = writer
        self._num_clusters = num_clusters
        self._num_matches = num_matches

    def after_train(self, trainer: Trainer) -> None:
        """Extracts features, clusters them and writes the files."""
        with progress_bar("Extracting", "img") as progress:
            model = trainer.clustered_model or trainer.inference_model
            features = self._images.features(model, trainer.device, progress)
        with distributed.torch_threads_kept():
            labels = distributed.run_on_main(lambda: self._cluster(features))
        if not distributed.is_main():
            return
        confidence = cluster_confidence(features.test, labels.cluster)
        matches = cross_camera_matches(features, self._num_matches)
        clusters_file = self._output_dir / "clusters.csv"
        matches_file = self._output_dir / "matches.csv"
        write_clusters(clusters_file, self._records, labels.cluster, confidence)
        write_matches(matches_file, self._records, matches, labels.cluster)
        written = [clusters_file, matches_file, *self._draw(labels, matches, trainer.step)]
        numbers = cluster_statistics(labels, features.pids.cpu(), features)
        logger.info(
            "Clusters of the final model\n%s\nTo judge them:\n%s",
            tabulate([[number_text(value) for value in numbers.values()]], headers=[*numbers]),
            "\n".join(f"  {path}" for path in written),
        )

    def _cluster(self, features: FeatureSet) -> PseudoLabels:
        try:
            with progress_bar("Clustering", "img") as progress:
                labels = self._labeller(features, self._records, progress)
        except ClusteringError as error:
            logger.warning("The final model: %s", error)
            return PseudoLabels.from_clusters(torch.full((len(features),), OUTLIER))
        rows = features.present.cpu().nonzero()[:, 0]  # without those of a source
        return labels[rows].scatter(rows, len(labels))

    def _draw(self, labels: PseudoLabels, matches: Sequence[Match], step: int) -> list[Path]:
        written = []
        if self._num_clusters and labels.num_clusters:
            path = self._output_dir / "clusters.png"
            draw_clusters(path, labels.cluster, self._records, rows=self._num_clusters)
            written.append(path)
        if matches:
            path = self._output_dir / "matches.png"
            pairs = []
            for first, second, similarity in matches[:_PAIRS]:
                one, other = self._records[first], self._records[second]
                text = f"{camera_name(one)} - {camera_name(other)}  {similarity:.2f}"
                pairs.append((one.path, other.path, text))
            draw_pairs(path, pairs)
            written.append(path)
        for path in written:
            self._writer.write_image(f"pictures/{path.stem}", path, step)
        return written
