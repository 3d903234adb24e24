"""Labels of two domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reid.labelling.labellers import Identities, Labeller
from reid.registry import LABELLER
from reid.structures import OUTLIER, FeatureSet, ImageRecord, ProgressBar, PseudoLabels


@LABELLER.register()
class PerDomain(Labeller):
    """The source has its identities, the target its clusters; the source's labels come first.

    Only features of the target are needed, unless the source's labeller needs its own.

    Args:
        target: Labels the target's images.
        source: Labels the images of the sources; null: their identities.
        source_domains: How many of the joined training sets, from the first on, are sources.

    Raises:
        ValueError: There is no source.
    """

    def __init__(
        self, target: Labeller, source: Labeller | None = None, source_domains: int = 0
    ) -> None:
        if source_domains < 1:
            raise ValueError("expected a source, but datasets.source is not set")
        self._target = target
        self._source = Identities() if source is None else source
        self._source_domains = source_domains
        self.needs_raw = self._target.needs_raw or self._source.needs_raw
        self.needs_source = not self._source.fixed

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images.

        Raises:
            ClusteringError: The target has no cluster.
        """
        is_source = torch.tensor([record.domain < self._source_domains for record in records])
        rows = is_source.nonzero()[:, 0], (~is_source).nonzero()[:, 0]

        def label(labeller: Labeller, part: Tensor) -> PseudoLabels:
            chosen = None if features is None else features[part.to(features.test.device)]
            return labeller(chosen, [records[row] for row in part.tolist()], progress)

        source = label(self._source, rows[0])
        if self._target.uses_source:
            target = self._target(features, records, progress)[rows[1]]
        else:
            target = label(self._target, rows[1])
        return join_labels(source, rows[0], target, rows[1])

    @property
    def uses_source(self) -> bool:
        """Whether the target's labeller does."""
        return self._target.uses_source

    @property
    def choices(self) -> Mapping[str, float]:
        """Those of the target's labeller."""
        return self._target.choices

    def begin_stage(self, round_number: int, ended: nn.Module | None) -> None:
        """Tells both labellers."""
        self._source.begin_stage(round_number, ended)
        self._target.begin_stage(round_number, ended)

    def state_dict(self) -> dict[str, Any]:
        """The states of both labellers, if they have any."""
        states = {"source": self._source.state_dict(), "target": self._target.state_dict()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._source.load_state_dict(state.get("source", {}))
        self._target.load_state_dict(state.get("target", {}))


def join_labels(
    first: PseudoLabels, first_rows: Tensor, second: PseudoLabels, second_rows: Tensor
) -> PseudoLabels:
    """Labels of two groups of images as labels of all; those of the first group come first.

    What only one group has in `side`, the other has as `PseudoLabels.scatter` fills it.

    Args:
        first: Labels of M images.
        first_rows: (M,) their places among all.
        second: Labels of the other images.
        second_rows: Their places.
    """
    count = len(first) + len(second)
    one, other = first.scatter(first_rows, count), second.scatter(second_rows, count)

    def joined(before: Tensor, after: Tensor, offset: int) -> Tensor:
        return torch.where(after == OUTLIER, before, after + offset)

    side = {**one.side, **other.side}
    for name in one.side.keys() & other.side.keys():
        side[name][first_rows] = first.side[name]
    clusters = first.num_clusters
    return PseudoLabels(
        joined(one.cluster, other.cluster, clusters),
        joined(one.proxy, other.proxy, first.num_proxies),
        torch.cat((first.proxy_to_cluster, second.proxy_to_cluster + clusters)),
        torch.cat((first.proxy_to_camera, second.proxy_to_camera)),
        side,
    )
