"""From the config to the labeller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from reid.config import Config
from reid.labelling import Labeller
from reid.registry import LABELLER, ConfigError, MovedSpec, build
from reid.structures import ImageRecord


def labeller_spec(config: Config) -> dict[str, Any]:
    """The spec of `labeller`, with what `clusterer` stands for filled in.

    `clusterer` alone means the labeller Clusters with it, and neither of the two the identities.

    Raises:
        ConfigError: Both name a clusterer.
    """
    spec, clusterer = config.labeller, config.clusterer
    if spec is None and not clusterer:
        return {"name": "Identities"}
    if clusterer is None:
        return dict(spec or {})
    clusterer = MovedSpec(clusterer, "clusterer")
    if spec is None:
        return {"name": "Clusters", "clusterer": clusterer}
    if "clusterer" in spec:
        raise ConfigError("clusterer: labeller.clusterer names one already; remove one of the two")
    return {**spec, "clusterer": clusterer}


def build_labeller(config: Config, records: Sequence[ImageRecord], name: str) -> Labeller:
    """Where the labels of an epoch come from.

    Args:
        config: Of the run.
        records: The training images.
        name: Of their dataset, for messages.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or no image has an identity where
            identities are the labels.
    """
    labeller = cast(Labeller, build(LABELLER, labeller_spec(config), "labeller"))
    if labeller.fixed and not any(record.pid >= 0 for record in records):
        raise ConfigError(
            f"clusterer: null takes the identities as labels, but no training image of {name} has "
            "one; set a clusterer, e.g. JaccardDBSCAN"
        )
    return labeller
