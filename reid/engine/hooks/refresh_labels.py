"""The start of each epoch: take features, make labels, pass them on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from tabulate import tabulate
from torch import Tensor

from reid import distributed
from reid.data.samplers import LabelledSampler
from reid.engine.logs import progress_bar
from reid.engine.metrics import MetricWriter
from reid.engine.randomness import replaying, torch_random_state
from reid.engine.trainer import Trainer
from reid.evaluation.extract import ImageSet, features_of
from reid.labelling import ClusteringError, Labeller, cluster_statistics
from reid.modeling.classifiers import classifiers_of
from reid.modeling.losses import Criterion, Loss
from reid.modeling.memory_states import (
    check_memory_states,
    kept_features,
    load_memory_states,
    memory_states,
)
from reid.registry import Hook, shortened
from reid.structures import FeatureSet, PseudoLabels

logger = logging.getLogger(__name__)

OnCollapse = Literal["warn", "keep", "stop"]


@dataclass(frozen=True)
class LabelledImages:
    """The training images as a labeller needs them.

    Attributes:
        every: Those that losses may need, such as both domains.
        clustered: Those whose features the labeller needs.
        shown: (M,) the images that statistics are about, such as the target's.
        pids: (N,) identities for statistics, -1 = unknown. Those of `every` and `clustered` are
            what the labeller may see.
    """

    every: ImageSet
    clustered: ImageSet
    shown: Tensor
    pids: Tensor

    @classmethod
    def of(cls, images: ImageSet) -> LabelledImages:
        """All images of a set, for all purposes."""
        pids = torch.tensor([record.pid for record in images.records])
        return cls(images, images, torch.arange(len(pids)), pids)


class RefreshPseudoLabels(Hook):
    """Gives sampler and criterion new labels before each epoch, and tells the criterion the epoch.

    Labels are made of the features that a loss keeps over the epochs, such as the rows of an
    instance memory, or else of the model's. The model's features are extracted only if the labeller
    or a loss needs them.

    Args:
        labeller: Makes the labels: once if they are `fixed`, otherwise in every epoch from the
            features of all training images.
        images: The training images, prepared as in tests; with two domains, which of them are
            needed for what.
        sampler: Receives the labels.
        criterion: Receives the labels and the features.
        writer: Receives statistics of the labels.
        on_collapse: What to do if an epoch's features give no cluster or only one.
            `warn`: train on a single cluster; without any cluster, training ends.
            `keep`: use the last epoch's labels again, with the new features, so that memories fit
            the present model; in the first epoch, training ends.
            `stop`: training ends.
        stages: Number of each stage in which this hook works -> when labels are new. The sampler
            and the criterion are then those of the stage. None: the run has no stages.

    Raises:
        ValueError: `on_collapse` is none of these words.
    """

    def __init__(
        self,
        labeller: Labeller,
        images: ImageSet | LabelledImages,
        sampler: LabelledSampler,
        criterion: Criterion,
        writer: MetricWriter,
        on_collapse: OnCollapse = "warn",
        stages: Mapping[int, Literal["epoch", "once"]] | None = None,
    ) -> None:
        if on_collapse not in ("warn", "keep", "stop"):
            raise ValueError(f"on_collapse: expected warn, keep or stop, got {on_collapse!r}")
        self._labeller = labeller
        given = images if isinstance(images, LabelledImages) else LabelledImages.of(images)
        self._every, self._clustered = (
            replace(wanted, raw="global") if labeller.needs_raw else wanted
            for wanted in (given.every, given.clustered)
        )
        self._shown = given.shown
        self._pids = given.pids[given.shown]
        self._sampler = sampler
        self._criterion = criterion
        self._writer = writer
        self._labelled = False
        self._on_collapse = on_collapse
        self._last: PseudoLabels | None = None
        self._stages = stages
        self._works = True
        self._keeps_memories = False
        self._carried: Mapping[str, Tensor] | None = None

    @property
    def last_clusters(self) -> Tensor | None:
        """(N,) the cluster of each image in the last epoch, -1 = outlier; None before the first.

        With two domains, they are the clusters of the target.
        """
        if self._last is None:
            return None
        return self._last[self._shown].scatter(self._shown, len(self._last)).cluster

    def before_stage(self, trainer: Trainer, ended: Criterion | None) -> None:
        """Forgets the labels of another stage, and tells the labeller that a stage begins."""
        self._labelled = self._keeps_memories = False
        self._carried = None
        self._follow(trainer)
        if self._works_in(trainer):
            self._labeller.begin_stage(trainer.stage.round, ended)

    def before_epoch(self, trainer: Trainer) -> None:
        """Makes labels of features, and passes both on.

        Raises:
            ClusteringError: No cluster, or only one, came out; see `on_collapse`.
            ValueError: A checkpoint has tensors of the criterion that do not fit its labels.
        """
        if not self._works_in(trainer):
            return
        if self._stages is None:
            self._criterion.set_epoch(trainer.epoch)
        else:
            self._sampler = cast(LabelledSampler, trainer.loader.batch_sampler)
            self._criterion.set_epoch(trainer.epoch - trainer.stage.start)
            self._keeps_memories = self._stages[trainer.stage.number] == "once"
        if self._carried is not None:
            self._go_on(trainer, self._carried)
            self._carried = None
        if self._labelled and self._keeps_memories:
            return
        needs_labels = not (self._labelled and self._labeller.fixed)
        if not (needs_labels or self._criterion.needs_features):
            return
        started = time.perf_counter()
        clustered, extracted = self._features(trainer)
        ready = time.perf_counter()
        labels, collapse = self._labels(clustered, trainer.epoch)
        times = ready - started, time.perf_counter() - ready
        self._sampler.set_labels(labels)
        self._criterion.set_labels(labels.to(trainer.device), extracted)
        self._labelled = True
        if distributed.is_main():
            if collapse:
                logger.warning("%s", collapse)
            self._log(trainer, labels, clustered, times, repeated=bool(collapse))
        if not self._labeller.fixed:
            self._last = labels

    def _follow(self, trainer: Trainer) -> None:
        """Takes the criterion of the trainer's stage."""
        self._works = self._works_in(trainer)
        if self._stages is not None:
            self._criterion = trainer.criterion

    @property
    def _losses(self) -> Iterable[Loss]:
        """The losses that this hook serves in the present stage."""
        return self._criterion if self._works else ()

    def _works_in(self, trainer: Trainer) -> bool:
        return self._stages is None or trainer.stage.number in self._stages

    def _go_on(self, trainer: Trainer, carried: Mapping[str, Tensor]) -> None:
        """Goes on within a stage whose labels are made once, after a resume.

        The criterion takes the labels first, so that its tensors have the right shapes.

        Raises:
            ValueError: The tensors do not fit.
        """
        saved = {name: value.clone() for name, value in self._criterion.state_dict().items()}
        with replaying(trainer.device, torch_random_state(trainer.device)):
            clustered, extracted = self._features(trainer)
            labels = self._last or self._labels(clustered, trainer.epoch)[0]
            self._sampler.set_labels(labels)
            self._criterion.set_labels(labels.to(trainer.device), extracted)
        self._criterion.load_state_dict(saved)
        for _, classifier in classifiers_of(self._criterion):
            classifier.refilled = False  # the rows, and so their moments, are the checkpoint's
        tensors = _unsaved(self._criterion)
        for name in sorted(tensors.keys() | carried.keys()):
            here, there = tensors.get(name), carried.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise ValueError(
                    f"the checkpoint's criterion.{name} is of shape "
                    f"{None if there is None else tuple(there.shape)}, this run's of shape "
                    f"{None if here is None else tuple(here.shape)}; resume with the old settings"
                )
            here.copy_(there)
        self._labelled = True

    def _features(self, trainer: Trainer) -> tuple[FeatureSet | None, FeatureSet | None]:
        """The features to cluster, and those of the model; None where nobody needs them."""
        kept = kept_features(self._criterion)
        extracted = None
        if self._criterion.needs_features or (kept is None and not self._labeller.fixed):
            images = self._every if self._criterion.needs_features else self._clustered
            with progress_bar("Extracting", "img") as progress:
                model = trainer.clustered_model or trainer.inference_model
                extracted = images.features(model, trainer.device, progress)
        if kept is None:
            return extracted, extracted
        clustered = features_of(self._every.records, kept.test, kept.unit, kept.present)
        return clustered, extracted

    def state_dict(self) -> dict[str, Any]:
        """The last labels, the labeller's state, and memories that last beyond an epoch.

        The next epoch compares its labels with the last ones, or uses those again.
        """
        state: dict[str, Any] = {}
        if self._keeps_memories:
            state["criterion"] = _unsaved(self._criterion)
        if self._last is not None:
            names = [field.name for field in fields(PseudoLabels) if field.name != "side"]
            state["labels"] = {name: getattr(self._last, name) for name in names}
            side = {name: column for name, column in self._last.side.items() if column.ndim == 1}
            state["labels"]["side"] = side
        if labeller := self._labeller.state_dict():
            state["labeller"] = labeller
        if memories := memory_states(self._losses):
            state["memories"] = memories
        return state

    def check_state(self, state: Mapping[str, Any], trainer: Trainer, epoch: int) -> None:
        """Checks the last labels and the memories.

        Raises:
            ValueError: They are no labels or not the memories of these losses, or the number of
                training images has changed.
        """
        self._follow(trainer)
        try:
            count = len(self._every.records)
            check_memory_states(self._losses, state.get("memories", []), count)
        except ValueError as error:
            raise ValueError(f"memories: {error}") from error
        if not isinstance(state.get("labeller", {}), Mapping):
            raise ValueError(f"labeller: expected a mapping, got {shortened(state['labeller'])}")
        for name, value in dict(state.get("criterion", {})).items():
            if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
                raise ValueError(f"criterion.{name}: expected finite numbers")
        if "labels" not in state:
            return
        labels = PseudoLabels(**state["labels"])
        if len(labels) != len(self._every.records):
            raise ValueError(
                f"the checkpoint comes from a run on {len(labels):,} training images, but this "
                f"run has {len(self._every.records):,}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes labels and memories back; those of a stage wait until the next epoch begins."""
        self._last = PseudoLabels(**state["labels"]) if "labels" in state else None
        self._labeller.load_state_dict(state.get("labeller", {}))
        load_memory_states(self._losses, state.get("memories", []))
        self._carried = state.get("criterion")

    def _log(
        self,
        trainer: Trainer,
        labels: PseudoLabels,
        features: FeatureSet | None,
        times: tuple[float, float],
        repeated: bool,
    ) -> None:
        labels, shown = labels[self._shown], self._shown
        last = None if self._last is None else self._last.cluster[shown]
        if features is not None:
            features = features[shown.to(features.test.device)]
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
        """Makes labels on the main process and sends them, or the error, to all others.

        The other processes take part only in the labeller's exact neighbour searches.

        Returns:
            The labels. And why they are the last epoch's labels; empty if they are new.
        """

        def work() -> tuple[PseudoLabels, str]:
            try:
                with progress_bar("Labelling", "img") as progress:
                    labels = self._labeller(features, self._every.records, progress)
            except ClusteringError as error:
                problem = f"epoch {epoch + 1}: {error}"
            else:
                shown = labels[self._shown]
                if self._labeller.fixed or shown.num_clusters > 1:
                    return labels, ""
                problem = (
                    f"epoch {epoch + 1}: there is only one cluster, of all "
                    f"{len(shown) - shown.num_outliers:,} images that are not outliers; other "
                    "options of the clusterer or a lower solver.base_lr may help"
                )
                if self._on_collapse == "warn":
                    logger.warning("%s", problem)
                    return labels, ""
            if self._on_collapse == "keep" and self._last is not None:
                return self._last, f"{problem}. This epoch uses the last epoch's labels again"
            raise ClusteringError(problem)

        with distributed.torch_threads_kept():
            return distributed.run_on_main(work)


def _unsaved(criterion: Criterion) -> dict[str, Tensor]:
    """The criterion's buffers that its state leaves out, such as memories, by name."""
    saved = criterion.state_dict().keys()
    return {name: value for name, value in criterion.named_buffers() if name not in saved}


def number_text(value: float) -> str:
    """A statistic for a table: whole numbers without decimals, others with three."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"
