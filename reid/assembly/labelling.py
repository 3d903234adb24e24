"""Builds the labeller of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from reid.config import Config
from reid.labelling import Labeller
from reid.registry import LABELLER, ConfigError, MovedSpec, build
from reid.structures import ImageRecord


def labeller_spec(config: Config) -> dict[str, Any]:
    """The spec of `labeller`, completed from `clusterer`.

    If only `clusterer` is set, the labeller is Clusters with this clusterer. If neither is set, the
    labeller is Identities.

    Raises:
        ConfigError: `clusterer` and `labeller.clusterer` are both set.
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
        raise ConfigError("clusterer: labeller.clusterer is set too; remove one of the two")
    return {**spec, "clusterer": clusterer}


def build_labeller(config: Config, records: Sequence[ImageRecord], name: str) -> Labeller:
    """Builds the labeller, which makes the labels of an epoch.

    Args:
        config: The run's config.
        records: The training images.
        name: The dataset's name, for messages.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or identities are to be the labels but
            no image has one.
    """
    labeller = cast(Labeller, build(LABELLER, labeller_spec(config), "labeller"))
    if labeller.fixed and not any(record.pid >= 0 for record in records):
        raise ConfigError(
            "clusterer: null means that identities are the labels, but no training image of "
            f"{name} has one; set a clusterer, e.g. JaccardDBSCAN"
        )
    return labeller
