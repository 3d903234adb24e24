"""The epoch cycle of unsupervised training: extract, cluster, hand the labels out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor

from reid import distributed
from reid.clustering import Clusterer, ClusteringError, cluster_readable, cluster_statistics
from reid.data.samplers import LabelledSampler
from reid.engine.logs import MetricWriter, progress_bar
from reid.engine.trainer import Hook, Trainer
from reid.evaluation.extract import Precision, extract_features
from reid.evaluation.visualize import draw_clusters
from reid.modeling.losses import Criterion
from reid.neighbors import run_on_main
from reid.structures import Batch, FeatureSet, ImageRecord, PseudoLabels

logger = logging.getLogger(__name__)

OnCollapse = Literal["warn", "keep", "stop"]


class RefreshPseudoLabels(Hook):
    """Gives sampler and criterion their labels before each epoch, and the criterion the epoch.

    With a clusterer: features of every training image, clustered anew each epoch. Without one the
    identities are the labels, which makes training supervised; features are then extracted only
    for a criterion that needs them.

    Args:
        clusterer: FeatureSet -> PseudoLabels; None: labels are identities.
        loader: The training images with the test transform.
        records: The training images.
        sampler: Gets the labels.
        criterion: Gets the labels and the features.
        writer: Gets the statistics of the clusters.
        on_collapse: What happens where an epoch's features give no cluster, or a single one.
            `warn`: a single one is trained on; no cluster ends training. `keep`: the last epoch's
            labels serve once more, with the new features, so that a memory made from them fits the
            model; the first epoch has none to keep, and training ends. `stop`: training ends.
        allow_missing: Whether the loader may leave out images that cannot be read: they are in no
            cluster then, and the features that the criterion gets of them are 0.
        precision: Of extraction; see `extract_features`.

    Raises:
        ValueError: `on_collapse` is none of these words.
    """

    def __init__(
        self,
        clusterer: Clusterer | None,
        loader: Iterable[Batch],
        records: Sequence[ImageRecord],
        sampler: LabelledSampler,
        criterion: Criterion,
        writer: MetricWriter,
        on_collapse: OnCollapse = "warn",
        *,
        allow_missing: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        if on_collapse not in ("warn", "keep", "stop"):
            raise ValueError(f"on_collapse: expected warn, keep or stop, got {on_collapse!r}")
        self._clusterer = clusterer
        self._loader = loader
        self._records = records
        self._sampler = sampler
        self._criterion = criterion
        self._writer = writer
        self._allow_missing = allow_missing
        self._precision: Precision = precision
        self._pids = torch.tensor([record.pid for record in records])
        self._labelled = False
        self._on_collapse = on_collapse
        self._last: PseudoLabels | None = None

    @property
    def last_clusters(self) -> Tensor | None:
        """(N,) the last epoch's cluster of each image, -1 = outlier; None before there are any."""
        return None if self._last is None else self._last.cluster

    def before_epoch(self, trainer: Trainer) -> None:
        """Extracts, clusters, and hands (labels, features) out.

        Raises:
            ClusteringError: There is no cluster, or a single one; see `on_collapse`.
        """
        self._criterion.set_epoch(trainer.epoch)
        needs_features = self._clusterer is not None or self._criterion.needs_features
        if self._labelled and not needs_features:
            return
        started = time.perf_counter()
        features = None
        if needs_features:
            with progress_bar("Extracting", "img") as progress:
                features = extract_features(
                    trainer.model,
                    self._loader,
                    self._records,
                    trainer.device,
                    progress,
                    allow_missing=self._allow_missing,
                    precision=self._precision,
                )
        extracted = time.perf_counter()
        labels, collapse = self._labels(features, trainer.epoch)
        clustered = time.perf_counter()
        device_labels = labels.to(trainer.device)
        self._sampler.set_labels(labels)
        self._criterion.set_labels(device_labels, features)
        self._labelled = True
        if distributed.is_main():
            if collapse:
                logger.warning("%s", collapse)
            times = extracted - started, clustered - extracted
            self._log(trainer, labels, features, times, kept=bool(collapse))
        if self._clusterer is not None:
            self._last = labels

    def state_dict(self) -> dict[str, Any]:
        """The last labels: the next epoch's are compared with them, or they are kept."""
        if self._last is None:
            return {}
        names = [field.name for field in fields(PseudoLabels)]
        return {"labels": {name: getattr(self._last, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the last labels back.

        Raises:
            ValueError: They are of another number of images.
        """
        self._last = PseudoLabels(**state["labels"]) if "labels" in state else None
        if self._last is not None and len(self._last) != len(self._records):
            raise ValueError(
                f"the checkpoint is of a run on {len(self._last):,} training images, there are "
                f"{len(self._records):,} now"
            )

    def _log(
        self,
        trainer: Trainer,
        labels: PseudoLabels,
        features: FeatureSet | None,
        times: tuple[float, float],
        kept: bool,
    ) -> None:
        last = None if self._last is None else self._last.cluster
        numbers = cluster_statistics(labels, self._pids, features, last)
        numbers |= getattr(self._clusterer, "choices", {})
        if kept:
            numbers["kept"] = 1
        extraction, labelling = times
        self._writer.write(
            "labels",
            trainer.step,
            trainer.epoch,
            {**numbers, "extraction_time": extraction, "label_time": labelling},
        )
        logger.info(
            "Epoch %d: %s of %s images (extraction %.1f s, labels %.1f s)\n%s",
            trainer.epoch + 1,
            "identities" if self._clusterer is None else "clusters",
            f"{len(labels):,}",
            extraction,
            labelling,
            tabulate([[number_text(n) for n in numbers.values()]], headers=[*numbers]),
        )

    def _labels(self, features: FeatureSet | None, epoch: int) -> tuple[PseudoLabels, str]:
        """Made by the main process, the same on every process; so is an error.

        The other processes take their parts of the clusterer's exact neighbour searches.

        Returns:
            The labels; and why they are those of the last epoch, or nothing.
        """

        def work() -> tuple[PseudoLabels, str]:
            if self._clusterer is None:
                return identity_labels(self._records), ""
            assert features is not None
            try:
                with progress_bar("Clustering", "img") as progress:
                    labels = cluster_readable(self._clusterer, features, progress)
            except ClusteringError as error:
                problem = f"epoch {epoch + 1}: {error}"
            else:
                if labels.num_clusters > 1:
                    return labels, ""
                problem = (
                    f"epoch {epoch + 1}: all {len(labels) - labels.num_outliers:,} images that are "
                    "no outliers are one cluster; other options of the clusterer or a lower "
                    "solver.base_lr may help"
                )
                if self._on_collapse == "warn":
                    logger.warning("%s", problem)
                    return labels, ""
            if self._on_collapse == "keep" and self._last is not None:
                return self._last, f"{problem}. The last epoch's labels are kept"
            raise ClusteringError(problem)

        with distributed.torch_threads_kept():
            return run_on_main(work)


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


def identity_labels(records: Sequence[ImageRecord]) -> PseudoLabels:
    """Labels from identities, split by camera; unlabelled images are outliers."""
    return PseudoLabels.from_clusters(
        torch.tensor([record.pid for record in records]),
        torch.tensor([record.camid for record in records]),
    )


def number_text(value: float) -> str:
    """A statistic for a table: whole numbers as they are, others with three decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"
