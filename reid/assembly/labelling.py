"""Builds the labeller of a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from reid.config import Config
from reid.labelling import Labeller
from reid.registry import LABELLER, ConfigError, MovedSpec, build
from reid.structures import ImageRecord


def labeller_spec(config: Config) -> dict[str, Any]:
    """The spec of `labeller`, completed from `clusterer`.

    If only `clusterer` is set, the labeller is Clusters with this clusterer. If neither is set, the
    labeller is Identities. Beside a source, it is Identities for the source alone, and PerDomain
    with the clusterer for both domains.

    Raises:
        ConfigError: `clusterer` and `labeller.clusterer` are both set, or the clusterer for the
            target is missing.
    """
    spec, clusterer, sets = config.labeller, config.clusterer, config.datasets
    if spec is None and sets.domains == "source":
        return {"name": "Identities"}
    if spec is None and not clusterer:
        if sets.source is not None:
            raise ConfigError(
                "clusterer: expected one, e.g. JaccardDBSCAN, since identities of the target are "
                "never looked at; to train on the source alone, set datasets.domains to source"
            )
        return {"name": "Identities"}
    if clusterer is None:
        return dict(spec or {})
    clusterer = MovedSpec(clusterer, "clusterer")
    if spec is None:
        clusters = {"name": "Clusters", "clusterer": clusterer}
        both = sets.source is not None and sets.domains == "all"
        return {"name": "PerDomain", "target": clusters} if both else clusters
    if "clusterer" in spec:
        raise ConfigError("clusterer: labeller.clusterer is set too; remove one of the two")
    return {**spec, "clusterer": clusterer}


def clustering_config(config: Config) -> Config:
    """The settings by which the last stage clusters, without a source.

    It labels `TrainImages.clustered()`, which are the target's images if there is a source.

    Raises:
        ConfigError: A labeller is missing or is set twice.
    """
    last = config.of_stage(-1)
    if last.datasets.source is None:
        return last
    spec = labeller_spec(last)
    return replace(
        last,
        datasets=replace(last.datasets, source=None, domains="all"),
        model=replace(last.model, domain_bn=False),
        test=replace(last.test, source=False),
        labeller=spec["target"] if spec["name"] == "PerDomain" else spec,
        clusterer=None,
    )


def build_labeller(config: Config, records: Sequence[ImageRecord], name: str) -> Labeller:
    """Builds the labeller, which makes the labels of an epoch.

    Args:
        config: The run's config.
        records: The training images, as the labeller sees them.
        name: The dataset's name, for messages.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or identities are to be the labels but
            no image has one.
    """
    sets = config.datasets
    labeller = cast(
        Labeller,
        build(LABELLER, labeller_spec(config), "labeller", source_domains=sets.source_domains),
    )
    if not labeller.fixed:
        return labeller
    if sets.source is not None and sets.domains != "source" and config.labeller is None:
        raise ConfigError(
            f"labeller: {type(labeller).__name__} labels by identity, but those of the target are "
            "never looked at; set a clusterer, e.g. JaccardDBSCAN, or datasets.domains to source. "
            "If the target's images shall have no label, set the labeller explicitly"
        )
    if not any(record.pid >= 0 for record in records):
        raise ConfigError(
            "clusterer: null means that identities are the labels, but no training image of "
            f"{name} has one; set a clusterer, e.g. JaccardDBSCAN"
        )
    return labeller
