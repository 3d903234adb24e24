"""After training without labels: files by which a person can judge the clusters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from reid import distributed
from reid.clustering import Clusterer, cluster_statistics
from reid.engine.logs import progress_bar
from reid.engine.pseudo_labels import number_text
from reid.engine.trainer import Hook, Trainer
from reid.evaluation.clusters import (
    cluster_confidence,
    cross_camera_matches,
    write_clusters,
    write_matches,
)
from reid.evaluation.extract import extract_features
from reid.neighbors import run_on_main
from reid.registry import HOOK, ConfigError
from reid.structures import Batch, ImageRecord

logger = logging.getLogger(__name__)


@HOOK.register()
class WriteClusters(Hook):
    """Clusters the training images with the final model, and writes what shows if it is any good.

    Into the output folder: `clusters.csv` (path, cluster, camera, confidence; see
    `cluster_confidence`), `clusters.png` (a row of images for each cluster), `matches.csv` and
    `matches.png` (pairs of images of different cameras that are most alike).

    Args:
        output_dir: Where to.
        records: The training images.
        extraction: Batches of them with the test transform.
        clusterer: As in training.
        num_clusters: Clusters in the picture, spread from the largest to the smallest; 0 = none.
        num_matches: Pairs across cameras in the list, the first 20 of them in the picture.

    Raises:
        ConfigError: Training has no clusterer.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        output_dir: Path,
        records: Sequence[ImageRecord],
        extraction: Iterable[Batch],
        clusterer: Clusterer | None,
        num_clusters: int = 24,
        num_matches: int = 200,
    ) -> None:
        if clusterer is None:
            raise ConfigError("WriteClusters: expected a clusterer, but labels are the identities")
        if num_clusters < 0 or num_matches < 1:
            raise ValueError(
                "expected num_clusters of 0 or more and num_matches of 1 or more, got "
                f"{num_clusters}, {num_matches}"
            )
        self._output_dir = output_dir
        self._records = records
        self._extraction = extraction
        self._clusterer = clusterer
        self._num_clusters = num_clusters
        self._num_matches = num_matches

    def after_train(self, trainer: Trainer) -> None:
        """Extracts, clusters and writes.

        Raises:
            ClusteringError: There is no cluster.
        """
        with progress_bar("Extracting", "img") as progress:
            features = extract_features(
                trainer.model, self._extraction, self._records, trainer.device, progress
            )
        labels = run_on_main(lambda: self._clusterer(features))
        if not distributed.is_main():
            return
        confidence = cluster_confidence(features.global_feat, labels.cluster)
        matches = cross_camera_matches(features, self._num_matches)
        clusters_file = self._output_dir / "clusters.csv"
        matches_file = self._output_dir / "matches.csv"
        write_clusters(clusters_file, self._records, labels.cluster, confidence)
        write_matches(matches_file, self._records, matches, labels.cluster)
        written = [clusters_file, matches_file]
        numbers = cluster_statistics(labels, features.pids.cpu(), features)
        logger.info(
            "Clusters of the final model\n%s\nTo judge them:\n%s",
            tabulate([[number_text(value) for value in numbers.values()]], headers=[*numbers]),
            "\n".join(f"  {path}" for path in written),
        )
