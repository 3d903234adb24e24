"""The labels that the first epoch of a run would train on, without training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from reid import distributed
from reid.assembly.images import build_image_set, build_train_images, image_size
from reid.assembly.network import build_training_model
from reid.assembly.plugins import register_parts
from reid.assembly.specs import check_specs
from reid.assembly.stages import build_labellers
from reid.config import Config
from reid.engine.logs import progress_bar
from reid.engine.randomness import seed_everything
from reid.files import write_text
from reid.labelling import ClusteringError, cluster_statistics
from reid.registry import ConfigError
from reid.workflows.session import started

logger = logging.getLogger(__name__)

_NEAR = 0.1


def first_labels(config: Config, expected: int = 0) -> dict[str, float]:
    """Labels the training images with the weights that training starts from.

    Many published runs start from known weights, so their first number of clusters tells whether
    weights, network, preprocessing and data are those of the authors, before days of training.
    Writes log_first_labels.txt and first_labels.json to `config.output_dir`.

    Args:
        config: Of the run.
        expected: The published number of clusters; 0: none is known.

    Returns:
        See `cluster_statistics`.

    Raises:
        ConfigError: A setting is wrong, or the run's labels do not come from features.
        DataError: The images are not what was expected.
        WeightsError: The weights do not fit.
        ClusteringError: The features give no clusters, or their number differs from `expected` by
            more than a tenth.
    """
    if expected < 0:
        raise ConfigError(f"--expect-clusters: expected a number of clusters, got {expected}")
    with started(config, "log_first_labels.txt") as (device, _):
        register_parts(config)
        check_specs(config, training=True)
        seed_everything(config.seed)
        images = build_train_images(config)
        records = images.load()
        labeller = build_labellers(config, records, images.name)[0]
        if labeller.fixed:
            raise ConfigError(
                "clusterer: expected one, since --first-labels counts clusters; this run is "
                "trained on the identities"
            )
        model = build_training_model(config, image_size(config.input), images, device)
        image_set = build_image_set(config, "training images", records)
        with progress_bar("Extracting", "img") as progress:
            features = image_set.features(model, device, progress)

        def label() -> dict[str, float]:
            with progress_bar("Clustering", "img") as progress:
                labels = labeller(features, records, progress)
            pids = torch.tensor([record.pid for record in records])
            return cluster_statistics(labels, pids, features)

        numbers = distributed.run_on_main(label)
        if distributed.is_main():
            _tell(numbers, len(records), Path(config.output_dir), expected)
    if expected and abs(numbers["clusters"] - expected) > _NEAR * expected:
        raise ClusteringError(
            f"expected about {expected:,} clusters, got {numbers['clusters']:,.0f}: weights, "
            "network, preprocessing, clustering options or data differ from the published run's, "
            "or its figure is of another recipe"
        )
    return numbers


def _tell(numbers: dict[str, float], count: int, output_dir: Path, expected: int) -> None:
    write_text(output_dir / "first_labels.json", json.dumps(numbers, indent=2) + "\n")
    logger.info(
        "The first epoch would train on %s clusters of %s images; %s images are outliers%s\n%s",
        f"{numbers['clusters']:,.0f}",
        f"{count - numbers['outliers']:,.0f}",
        f"{numbers['outliers']:,.0f}",
        f". Expected: about {expected:,} clusters" if expected else "",
        "\n".join(f"  {name:<16}{value:.6g}" for name, value in numbers.items()),
    )
