"""Evaluation by appearance and time together (st-ReID)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from reid.evaluation.evaluation import Evaluation
from reid.evaluation.evaluators import Market1501Evaluator
from reid.evaluation.joint_distance import JointDistance, join, joint_blocks
from reid.evaluation.ranking import rank_again
from reid.evaluation.time_histograms import Doubles, Integers, TimeHistograms, count_times
from reid.neighbors import rerank_distances
from reid.registry import EVALUATOR, Range
from reid.structures import DataError, FeatureSet, ImageRecord, ProgressBar

_COLUMNS = ("path", "cluster")


@EVALUATOR.register()
class SpatialTemporalEvaluator(Market1501Evaluator):
    """Any model's features, joined with the times that persons take between cameras.

    Wang et al., *Spatial-Temporal Person Re-identification* (st-ReID, AAAI 2019). Histograms of the
    times between two cameras are counted on the training images (`count_times`), smoothed, and
    looked up for each query and gallery image; the product of both likenesses (`joint_score`) ranks
    the gallery. Pairs of cameras that no person of the training set passes, and times beyond the
    last bin, have the share 0. Needs a frame for each image and cameras with one clock, or with
    constant offsets. Memory: cameras^2 x bins, and blocks of 64 MB.

    The published figures have AP `trapezoid`. Queries without a match are ignored, whereas the
    published code counts 0 for them; Market-1501 and DukeMTMC-reID have none.

    Args:
        clusters: A clusters.csv of a run without labels (hook `WriteClusters`), whose clusters
            take the place of identities. Empty: the identities of the training images.
        bins: Longer times than `bins` * `interval` frames count as never seen. Published: 5000
            (Market-1501), 3000 (DukeMTMC-reID).
        interval: Frames in a bin.
        smoothing: Standard deviation of the smoothing, in bins; 0 = none.
        alpha: Steepness of both factors of the likeness.
        reranking: k-reciprocal re-ranking of the joint distance, as in st-ReID, before the ranking.
        **options: Those of `Market1501Evaluator`, for ranks, AP and re-ranking.

    Raises:
        ValueError: A number is out of its range.
    """

    fixed_options = ("query_expansion", "normalize")
    needs_training = True

    def __init__(
        self,
        clusters: str = "",
        bins: Annotated[int, Range(1, 1_000_000)] = 5000,
        interval: Annotated[int, Range(1, 1_000_000_000)] = 100,
        smoothing: Annotated[float, Range(0, 1e6)] = 50.0,
        alpha: Annotated[float, Range(0, 1e6)] = 5.0,
        reranking: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(reranking=reranking, **options)
        if bins < 1 or interval < 1 or smoothing < 0 or alpha < 0:
            raise ValueError(
                "expected bins and interval of 1 or more, smoothing and alpha of 0 or more, got "
                f"{bins}, {interval}, {smoothing}, {alpha}"
            )
        self._clusters = clusters
        self._bins = bins
        self._interval = interval
        self._smoothing = smoothing
        self._steepness = alpha
        self._model: TimeHistograms | None = None

    @property
    def ranked_by(self) -> str:
        """The kind of distance, in words."""
        source = "clusters" if self._clusters else "identities"
        text = (
            f"appearance and time (histograms of {source}, {self._bins} bins of {self._interval} "
            f"frames, smoothing {self._smoothing:g}, alpha {self._steepness:g})"
        )
        return f"{text} and {super().ranked_by}" if self._reranking else text

    def learn(self, records: Sequence[ImageRecord]) -> None:
        """Counts the times between cameras.

        Raises:
            DataError: Images have no identity, cluster or frame, or `clusters` cannot be read.
        """
        labels = self._labels(records)
        self._model = count_model(
            labels,
            np.array([record.camid for record in records]),
            np.array([record.frame for record in records]),
            bins=self._bins,
            interval=self._interval,
            smoothing=self._smoothing,
        )

    def rank_again(self, evaluation: Evaluation, progress: ProgressBar | None = None) -> Evaluation:
        """The evaluation, ranked by appearance and time.

        Raises:
            ValueError: `learn` was not called, or an image has no frame.
        """
        if (evaluation.ap, evaluation.ranked_by) == (self.ap, self.ranked_by):
            return evaluation
        if self._model is None:
            raise ValueError(
                "SpatialTemporalEvaluator needs the training images; tools/train_net.py gives it "
                "these, in training and with --eval-only"
            )
        query, gallery = evaluation.query, evaluation.gallery
        for name, images in (("query", query), ("gallery", gallery)):
            unknown = int((images.frames < 0).sum())
            if unknown:
                raise ValueError(
                    f"{unknown:,} of {len(images):,} {name} images have no frame number; "
                    "datasets/README.md says which datasets have one"
                )
        blocks = (
            self._reranked(query, gallery, progress)
            if self._reranking
            else joint_blocks(query, gallery, self._model, self._steepness)
        )
        return rank_again(
            evaluation, blocks, ap=self.ap, ranked_by=self.ranked_by, max_rank=max(self._ranks)
        )

    def _reranked(
        self, query: FeatureSet, gallery: FeatureSet, progress: ProgressBar | None
    ) -> Iterator[tuple[int, Doubles]]:
        assert self._model is not None
        both = join(query, gallery)
        found = rerank_distances(
            JointDistance.of(both, self._model, self._steepness).columns,
            len(both),
            k1=self._k1,
            k2=self._k2,
            lambda_value=self._original_weight,
            subtract_minimum=False,
            progress=progress,
        )
        for start, rows in found.blocks():
            if start >= len(query):
                return
            yield start, rows[: len(query) - start, len(query) :]

    def _labels(self, records: Sequence[ImageRecord]) -> Integers:
        if self._clusters:
            return read_clusters(Path(self._clusters), records)
        labels = np.array([record.pid for record in records])
        if not (labels >= 0).any():
            raise DataError(
                "test.evaluator: the training images have no identities to count times by; set "
                "CLUSTERS to the clusters.csv of a run (hook WriteClusters)"
            )
        return labels


def count_model(
    labels: Integers,
    camids: Integers,
    frames: Integers,
    *,
    bins: int,
    interval: int = 100,
    smoothing: float = 50.0,
) -> TimeHistograms:
    """Smoothed histograms of the times between cameras; see `count_times`.

    Args:
        labels: (N,) identity or cluster of each image, -1 = left out.
        camids: (N,).
        frames: (N,).
        bins: Number of bins.
        interval: Frames in a bin.
        smoothing: Standard deviation in bins; 0 = none.

    Raises:
        DataError: A labelled image has no frame.
    """
    try:
        counts = count_times(labels, camids, frames, num_bins=bins, width=interval)
    except ValueError as error:
        raise DataError(
            f"training images: {error}; datasets/README.md says which datasets have one"
        ) from error
    shares = counts.normalised()
    return shares.smoothed(smoothing) if smoothing else shares


def read_clusters(path: Path, records: Sequence[ImageRecord]) -> Integers:
    """The cluster (N,) of each image in a clusters.csv, -1 = outlier.

    Raises:
        DataError: The file is missing, is another one, or lacks an image.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {*_COLUMNS} <= {*(reader.fieldnames or ())}:
                raise DataError(
                    f"{path}: expected columns {', '.join(_COLUMNS)}, got "
                    f"{', '.join(reader.fieldnames or ()) or 'none'}"
                )
            cluster = {row["path"]: int(row["cluster"]) for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a clusters.csv ({error})") from error
    missing = [record.path for record in records if record.path not in cluster]
    if missing:
        raise DataError(
            f"{path}: has no cluster for {len(missing):,} of {len(records):,} training images, "
            f"such as {missing[0]}; it must come from a run on the same images"
        )
    return np.array([cluster[record.path] for record in records])
