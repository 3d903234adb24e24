"""Draws pictures of trained models, from a run or from a config and weights, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reid.assembly.data import build_test_datasets
from reid.assembly.images import build_image_set, build_train_images
from reid.assembly.labelling import clustering_config, labeller_spec
from reid.data.datasets.base import ReIDDataset
from reid.engine.logs import progress_bar
from reid.evaluation.ranking import list_matches
from reid.labelling import Labeller
from reid.pictures.attention import Fusion, rollout_maps
from reid.pictures.plots import Method, draw_embedding, embed
from reid.pictures.ranked import draw_matches
from reid.pictures.sheets import draw_attention, draw_clusters, draw_stripes
from reid.registry import LABELLER, ConfigError, build
from reid.structures import FeatureSet, ImageRecord, PseudoLabels
from reid.workflows.trained import TrainedModel, first_test_set

_MOST_POINTS = 3000


def pick_images(
    trained: TrainedModel, count: int, files: Sequence[Path] = ()
) -> tuple[list[ImageRecord], ReIDDataset | None]:
    """The given files, or else evenly spread queries of the first test set and its data set.

    Raises:
        ConfigError: The config has no test set.
        DataError: The test set's files are not what was expected.
    """
    if files:
        return [ImageRecord(str(path)) for path in files], None
    dataset = first_test_set(
        build_test_datasets(trained.config.datasets.test, trained.train_images)
    )
    query = dataset.load("query")
    return [query[i] for i in _spread(len(query), count)], dataset


def picture_attention(
    path: Path,
    models: Sequence[TrainedModel],
    records: Sequence[ImageRecord],
    dataset: ReIDDataset | None,
    fusion: Fusion,
) -> None:
    """Draws attention rollout of one or several models side by side, and of each branch.

    Args:
        path: The PNG file to write.
        models: The models, from left to right.
        records: The images.
        dataset: The data set of the images; None: they belong to none.
        fusion: How the attention heads of a layer are combined.

    Raises:
        ValueError: A model has no attention layers.
        DataError: An image cannot be read.
    """
    columns: list[tuple[str, Tensor]] = []
    for trained in models:
        batch = trained.batch(records, dataset)
        maps = rollout_maps(trained.model, batch, fusion)
        columns.append((trained.name, torch.stack(maps).mean(0)))
        if len(maps) > 1:
            columns += [(f"branch {i}", branch) for i, branch in enumerate(maps, 1)]
    draw_attention(path, [record.path for record in records], columns)


def picture_stripes(path: Path, trained: TrainedModel, records: Sequence[ImageRecord]) -> None:
    """Draws the horizontal parts of the model's branches.

    Raises:
        ConfigError: The head cuts no parts.
        DataError: An image cannot be read.
    """
    granularities = getattr(trained.model.head, "granularities", ())
    if not granularities:
        raise ConfigError(f"model.head: {type(trained.model.head).__name__} cuts no parts")
    rows = trained.model.backbone.grid[0]  # type: ignore[index]
    draw_stripes(path, [record.path for record in records], int(rows), granularities)


def picture_ranked_lists(path: Path, trained: TrainedModel, count: int) -> None:
    """Draws queries with their best matches; images that the protocol ignores are marked as junk.

    Raises:
        ConfigError: The config has no test set.
        DataError: An image cannot be read.
    """
    test_set = trained.test_set()
    with progress_bar(f"Extracting {test_set.name}", "img") as progress:
        query, gallery = test_set.features(trained.model, trained.device, progress)
    paths = test_set.query_paths, test_set.gallery_paths
    lists = list_matches(query, gallery, count, query_paths=paths[0], gallery_paths=paths[1])
    draw_matches(path, lists, *paths, keep_junk=True)


def picture_clusters(path: Path, trained: TrainedModel, rows: int, columns: int) -> list[int]:
    """Clusters the training set with the model and its clusterer, and draws a contact sheet.

    Returns:
        The clusters that were drawn.

    Raises:
        ConfigError: The config has no clusterer.
        ClusteringError: The clusterer finds no cluster.
    """
    records, _, labels = _find_clusters(trained)
    return draw_clusters(path, labels.cluster, records, rows=rows, columns=columns)


def picture_embedding(
    path: Path,
    query: FeatureSet,
    gallery: FeatureSet,
    colouring: Literal["identity", "camera"],
    method: Method,
    name: str,
) -> None:
    """Draws query and gallery images as points in the plane; see `draw_points`.

    Coloured by identity, only identities of queries get a colour.

    Raises:
        ValueError: There are fewer than three images.
        ModuleNotFoundError: `method` is UMAP, which is not installed.
    """
    features = torch.cat((query.test, gallery.test))
    groups = torch.cat((query.camids, gallery.camids))
    if colouring == "identity":
        groups = torch.cat((query.pids, gallery.pids))
        groups[~torch.isin(groups, query.pids)] = -1  # distractors get no colour
    draw_points(path, features, groups, colouring, method, name)


def draw_points(
    path: Path, features: Tensor, groups: Tensor, noun: str, method: Method, name: str
) -> None:
    """Draws features as points in the plane, coloured by group; at most 3000, evenly chosen."""
    rows = torch.tensor(_spread(len(features), _MOST_POINTS), device=features.device)
    points = embed(features[rows], method)
    kind = "t-SNE" if method == "tsne" else "UMAP"
    title = f"{name}: {kind} of {len(rows):,} images, coloured by {noun}"
    draw_embedding(path, points, groups[rows], title, noun=noun)


def picture_cluster_embedding(path: Path, trained: TrainedModel, method: Method) -> None:
    """Draws training images as points in the plane, coloured by cluster.

    Raises:
        ConfigError: The config has no clusterer.
        ClusteringError: The clusterer finds no cluster.
    """
    _, features, labels = _find_clusters(trained)
    rows = features.present
    shown = features.test[rows], labels.cluster[rows.cpu()]
    draw_points(path, *shown, "cluster", method, trained.name)


def _find_clusters(
    trained: TrainedModel,
) -> tuple[Sequence[ImageRecord], FeatureSet, PseudoLabels]:
    config = clustering_config(trained.config)
    labeller: Labeller = build(LABELLER, labeller_spec(config), "labeller", source_domains=0)
    if labeller.fixed:
        raise ConfigError("clusterer: expected one, e.g. JaccardDBSCAN, but it is not set")
    records = build_train_images(trained.config).clustered()
    images = build_image_set(config, "training images", records)
    with progress_bar("Extracting", "img") as progress:
        features = images.features(trained.model, trained.device, progress)
    with progress_bar("Labelling", "img") as progress:
        return images.records, features, labeller(features, images.records, progress)


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` evenly spaced numbers of 0 to total - 1."""
    return [int(i) for i in np.unique(np.linspace(0, total - 1, min(count, total)).round())]
