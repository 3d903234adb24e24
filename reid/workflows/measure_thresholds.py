"""Thresholds of a model, measured on labelled images or on clusters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from reid.assembly.data import build_test_datasets
from reid.assembly.labelling import labeller_spec
from reid.engine.logs import progress_bar
from reid.evaluation.feature_rows import FeatureRows, read_feature_rows
from reid.evaluation.thresholds import Source, Thresholds, measure_thresholds
from reid.labelling import Labeller
from reid.registry import LABELLER, ConfigError, build
from reid.shipped import tool
from reid.structures import DataError, FeatureSet, ImageRecord
from reid.workflows.extract import collect
from reid.workflows.extraction_lists import ImageList, list_dataset
from reid.workflows.predict import Predictor

logger = logging.getLogger(__name__)

_MOST_QUERIES = 10_000


def thresholds_of_features(
    predictor: Predictor, path: Path, *, clusters: bool = False
) -> Thresholds:
    """Thresholds from features of the model that `extract` wrote.

    Args:
        predictor: The model.
        path: The file. If it has query and gallery images, these are compared; else all images
            with an identity are compared with each other. Without identities, clusters replace
            them.
        clusters: Use clusters even if there are identities.

    Raises:
        ConfigError: Nothing is labelled, and there is no clusterer.
        DataError: The file is of another model, or has too few pairs.
        ClusteringError: There is no cluster.
    """
    rows = read_feature_rows(path)
    if rows.fingerprint != predictor.fingerprint:
        raise DataError(
            f"{path}: its features come from another model than {predictor.weights}, or from "
            f"another input size or flip-test; extract them again with {tool('extract')}"
        )
    return _of_rows(predictor, rows, path.name, clusters)


def thresholds_of_dataset(
    predictor: Predictor, words: Sequence[str], *, clusters: bool = False, num_workers: int = 0
) -> Thresholds:
    """Thresholds from images of a data set: query and gallery, or else its training images.

    Args:
        predictor: The model.
        words: NAME KEY VALUE KEY VALUE.
        clusters: See `thresholds_of_features`.
        num_workers: Processes that read images.

    Raises:
        ConfigError: The data set is unknown; or see `thresholds_of_features`.
        DataError: Its files are not what was expected, or have too few pairs.
        ClusteringError: There is no cluster.
    """
    images = list_dataset(words, predictor.card)
    return _of_images(predictor, images, clusters, num_workers)


def thresholds_of_run(
    predictor: Predictor, *, clusters: bool = False, num_workers: int = 0
) -> Thresholds:
    """Thresholds from the first test set of the model's config; without one, from clusters.

    The clusters are those of the training images.

    Args:
        predictor: The model.
        clusters: Use clusters even if there is a test set.
        num_workers: Processes that read images.

    Raises:
        ConfigError: The model has no config, or that names no images or no clusterer.
        DataError: Images are not what was expected, or have too few pairs.
        ClusteringError: There is no cluster.
    """
    if predictor.trained is None:
        raise ConfigError(
            f"{predictor.weights}: an ONNX file names no test set; say which images with --dataset "
            "or --features"
        )
    trained = predictor.trained
    test_sets = build_test_datasets(trained.config.datasets.test, trained.train_images)
    if test_sets and not clusters:
        test_set = trained.test_set()
        with progress_bar(f"Extracting {test_set.name}", "img") as progress:
            query, gallery = test_set.features(trained.model, trained.device, progress)
        paths = test_set.query_paths, test_set.gallery_paths
        return _measured(query, gallery, *paths, test_set.name, "pairs")
    if trained.train_images is None:
        raise ConfigError(
            f"{predictor.weights}: its config names no images; say which with --dataset or "
            "--features"
        )
    records = trained.train_images.load()
    nothing = [""] * len(records)
    images = ImageList(trained.train_images.name, records, records, nothing, nothing)
    return _of_images(predictor, images, True, num_workers)


def thresholds_of_model(predictor: Predictor, other: Path) -> Thresholds:
    """Thresholds that are stored for the same model in another file.

    Args:
        predictor: The model, such as an ONNX file that was exported before they were measured.
        other: Run folder, config or file of the model.

    Raises:
        ConfigError: That is another model, or has no thresholds.
        DataError: Their file is broken.
        WeightsError: The weights are broken or do not fit.
    """
    source = Predictor(other)
    if source.fingerprint != predictor.fingerprint:
        raise ConfigError(
            f"{other}: is another model than {predictor.weights}, or has another input size or "
            "flip-test; measure the thresholds with --features or --dataset"
        )
    if source.thresholds is None:
        raise ConfigError(
            f"{source.weights}: has no thresholds yet; measure them with --model {other}"
        )
    return source.thresholds


def _of_images(
    predictor: Predictor, images: ImageList, clusters: bool, num_workers: int
) -> Thresholds:
    rows, unreadable = collect(predictor, images, num_workers=num_workers)
    if unreadable:
        logger.warning("%d images are left out: %s", len(unreadable), unreadable[0][1])
    return _of_rows(predictor, rows, images.name, clusters)


def _of_rows(predictor: Predictor, rows: FeatureRows, name: str, clusters: bool) -> Thresholds:
    everything = rows.feature_set()
    if clusters or not (rows.pids >= 0).any():
        pids = _cluster(predictor, everything, rows)
        labelled = replace(everything, pids=pids)
        return _against_itself(labelled, rows.paths, name, "clusters")
    query, gallery = rows.rows_of("query"), rows.rows_of("gallery")
    if len(query) and len(gallery):
        paths = [[rows.paths[row] for row in which.tolist()] for which in (query, gallery)]
        sets = rows.feature_set(query), rows.feature_set(gallery)
        return _measured(*sets, paths[0], paths[1], name, "pairs")
    return _against_itself(everything, rows.paths, name, "pairs")


def _against_itself(
    features: FeatureSet, paths: Sequence[str], name: str, source: Source
) -> Thresholds:
    """From all pairs of labelled images; of many images, an even choice against all."""
    known = (features.pids >= 0).nonzero()[:, 0]
    features = features[known]
    known_paths = [paths[row] for row in known.tolist()]
    if len(known) <= _MOST_QUERIES:
        return _measured(features, features, known_paths, known_paths, name, source)
    chosen = torch.linspace(0, len(known) - 1, _MOST_QUERIES).long()
    chosen_paths = [known_paths[row] for row in chosen.tolist()]
    return _measured(features[chosen], features, chosen_paths, known_paths, name, source)


def _measured(
    query: FeatureSet,
    gallery: FeatureSet,
    query_paths: Sequence[str],
    gallery_paths: Sequence[str],
    name: str,
    source: Source,
) -> Thresholds:
    counts = f"{len(query):,} against {len(gallery):,} images"
    try:
        with progress_bar("Comparing", "img") as progress:
            return measure_thresholds(
                query,
                gallery,
                f"{name}, {counts}",
                source,
                query_paths=query_paths,
                gallery_paths=gallery_paths,
                progress=progress,
            )
    except ValueError as error:
        hint = "; pairs of one camera do not count"
        raise DataError(f"{name}: {error}{hint if 'got 0' in str(error) else ''}") from error


def _cluster(predictor: Predictor, features: FeatureSet, rows: FeatureRows) -> Tensor:
    """(N,) the clusters that the model's clusterer finds; -1: outlier."""
    if predictor.trained is None:
        raise ConfigError(
            f"{predictor.weights}: nothing is labelled, and an ONNX file has no clusterer; give "
            "labelled images, or the run that it was exported from"
        )
    labeller: Labeller = build(LABELLER, labeller_spec(predictor.trained.config), "labeller")
    if labeller.fixed:
        raise ConfigError(
            "clusterer: nothing is labelled, and the config has none; give labelled images with "
            "--dataset or --features, or set one in the config, e.g. JaccardDBSCAN"
        )
    records = [
        ImageRecord(path, camid=camid)
        for path, camid in zip(rows.paths, rows.camids.tolist(), strict=True)
    ]
    with progress_bar("Clustering", "img") as progress:
        labels = labeller(features, records, progress)
    return labels.cluster.to(features.pids.device)
