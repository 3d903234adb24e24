"""The epoch cycle: extract, label, hand the labels out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor

from reid import distributed
from reid.data.samplers import LabelledSampler
from reid.engine.logs import MetricWriter, progress_bar
from reid.engine.trainer import Trainer
from reid.evaluation.extract import ImageSet
from reid.labelling import ClusteringError, Labeller, cluster_statistics
from reid.modeling.losses import Criterion
from reid.registry import Hook, shortened
from reid.structures import FeatureSet, PseudoLabels

logger = logging.getLogger(__name__)

OnCollapse = Literal["warn", "keep", "stop"]


class RefreshPseudoLabels(Hook):
    """Gives sampler and criterion their labels before each epoch, and the criterion the epoch.

    Args:
        labeller: Makes the labels: in every epoch from the features of all training images, or
            once where they are `fixed`.
        images: The training images, as a model sees them in tests.
        sampler: Gets the labels.
        criterion: Gets the labels and the features.
        writer: Gets the statistics of the labels.
        on_collapse: What happens where an epoch's features give no cluster, or a single one.
            `warn`: a single one is trained on; no cluster ends training. `keep`: the last epoch's
            labels serve once more, with the new features, so that a memory made from them fits the
            model; the first epoch has none to keep, and training ends. `stop`: training ends.

    Raises:
        ValueError: `on_collapse` is none of these words.
    """

    def __init__(
        self,
        labeller: Labeller,
        images: ImageSet,
        sampler: LabelledSampler,
        criterion: Criterion,
        writer: MetricWriter,
        on_collapse: OnCollapse = "warn",
    ) -> None:
        if on_collapse not in ("warn", "keep", "stop"):
            raise ValueError(f"on_collapse: expected warn, keep or stop, got {on_collapse!r}")
        self._labeller = labeller
        self._images = images
        self._sampler = sampler
        self._criterion = criterion
        self._writer = writer
        self._pids = torch.tensor([record.pid for record in images.records])
        self._labelled = False
        self._on_collapse = on_collapse
        self._last: PseudoLabels | None = None

    @property
    def last_clusters(self) -> Tensor | None:
        """(N,) the last epoch's cluster of each image, -1 = outlier; None before there are any."""
        return None if self._last is None else self._last.cluster

    def before_epoch(self, trainer: Trainer) -> None:
        """Extracts, labels, and hands (labels, features) out.

        Raises:
            ClusteringError: There is no cluster, or a single one; see `on_collapse`.
        """
        self._criterion.set_epoch(trainer.epoch)
        needs_features = not self._labeller.fixed or self._criterion.needs_features
        if self._labelled and not needs_features:
            return
        started = time.perf_counter()
        features = None
        if needs_features:
            with progress_bar("Extracting", "img") as progress:
                features = self._images.features(trainer.inference_model, trainer.device, progress)
        extracted = time.perf_counter()
        labels, collapse = self._labels(features, trainer.epoch)
        times = extracted - started, time.perf_counter() - extracted
        self._sampler.set_labels(labels)
        self._criterion.set_labels(labels.to(trainer.device), features)
        self._labelled = True
        if distributed.is_main():
            if collapse:
                logger.warning("%s", collapse)
            self._log(trainer, labels, features, times, repeated=bool(collapse))
        if not self._labeller.fixed:
            self._last = labels

    def state_dict(self) -> dict[str, Any]:
        """The last labels: the next epoch's are compared with them, or they are kept.

        And what the labeller's next labels depend on.
        """
        state: dict[str, Any] = {}
        if self._last is not None:
            names = [field.name for field in fields(PseudoLabels)]
            state["labels"] = {name: getattr(self._last, name) for name in names}
        if labeller := self._labeller.state_dict():
            state["labeller"] = labeller
        return state

    def check_state(self, state: Mapping[str, Any], trainer: Trainer, epoch: int) -> None:
        """Checks the last labels.

        Raises:
            ValueError: They are none, or of another number of images.
        """
        if not isinstance(state.get("labeller", {}), Mapping):
            raise ValueError(f"labeller: expected a mapping, got {shortened(state['labeller'])}")
        if "labels" not in state:
            return
        labels = PseudoLabels(**state["labels"])
        if len(labels) != len(self._images.records):
            raise ValueError(
                f"the checkpoint is of a run on {len(labels):,} training images, there are "
                f"{len(self._images.records):,} now"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the last labels back."""
        self._last = PseudoLabels(**state["labels"]) if "labels" in state else None
        self._labeller.load_state_dict(state.get("labeller", {}))

    def _log(
        self,
        trainer: Trainer,
        labels: PseudoLabels,
        features: FeatureSet | None,
        times: tuple[float, float],
        repeated: bool,
    ) -> None:
        last = None if self._last is None else self._last.cluster
        numbers = cluster_statistics(labels, self._pids, features, last)
        numbers |= self._labeller.choices
        if repeated:
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
            "identities" if self._labeller.fixed else "clusters",
            f"{len(labels):,}",
            extraction,
            labelling,
            tabulate([[number_text(n) for n in numbers.values()]], headers=[*numbers]),
        )

    def _labels(self, features: FeatureSet | None, epoch: int) -> tuple[PseudoLabels, str]:
        """Made by the main process, the same on every process; so is an error.

        The other processes take their parts of the labeller's exact neighbour searches.

        Returns:
            The labels; and why they are those of the last epoch, or nothing.
        """

        def work() -> tuple[PseudoLabels, str]:
            try:
                with progress_bar("Labelling", "img") as progress:
                    labels = self._labeller(features, self._images.records, progress)
            except ClusteringError as error:
                problem = f"epoch {epoch + 1}: {error}"
            else:
                if self._labeller.fixed or labels.num_clusters > 1:
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
            return distributed.run_on_main(work)


def number_text(value: float) -> str:
    """A statistic for a table: whole numbers as they are, others with three decimals."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"
