"""Builds the stages of a run; a run without stages is one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from reid import distributed
from reid.assembly.criterion import build_criterion
from reid.assembly.data import hide_target_identities
from reid.assembly.images import (
    blank_batch,
    build_image_set,
    build_train_loader,
    build_training_set,
)
from reid.assembly.labelling import build_labeller, labeller_spec
from reid.assembly.optimization import build_optimization
from reid.assembly.sampler import build_sampler
from reid.config import Config
from reid.data.domain_samplers import TwoDomainSampler
from reid.data.loaders import BatchLoader
from reid.data.samplers import LabelledSampler
from reid.engine.hooks.refresh_labels import LabelledImages, RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.engine.stages import StageParts, Stages, carry_losses
from reid.evaluation.extract import ImageSet
from reid.labelling import Labeller
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.losses import Criterion
from reid.modeling.model import ReIDModel
from reid.modeling.network_outputs import try_out
from reid.registry import ConfigError
from reid.stage_settings import plan_stages
from reid.structures import ImageRecord

Domains: TypeAlias = Literal["all", "source", "target"]

logger = logging.getLogger(__name__)


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage; a run without stages is one."""
    return [config.of_stage(number) for number in range(len(config.stages) or 1)]


def build_labellers(config: Config, records: Sequence[ImageRecord], name: str) -> list[Labeller]:
    """The labeller of each stage; stages with the same labeller share it.

    Args:
        config: The run's config.
        records: The training images, as labellers see them.
        name: The dataset's name, for messages.

    Raises:
        ConfigError: A part is unknown or an option is wrong, or there are no identities to be the
            labels.
    """
    configs = stage_configs(config)
    keys: list[Any] = []
    labellers: list[Labeller] = []
    for number, stage in enumerate(configs):
        try:
            keys.append((labeller_spec(stage), stage.on_collapse, stage.datasets.domains))
            first = keys.index(keys[number])
            if first < number:
                labellers.append(labellers[first])
                continue
            labellers.append(build_labeller(stage, records, name))
        except ConfigError as error:
            raise in_stage(config, number, error) from None
    return labellers


def in_stage(config: Config, number: int, error: ConfigError) -> ConfigError:
    """The error, whose message names the stage too if the run has stages."""
    return ConfigError(f"stages[{number}]: {error}") if config.stages else error


class StageBuilder:
    """Builds what is new in each stage: criterion, optimization, sampler and loader.

    Args:
        config: The run's config.
        labellers: One for each stage.
        records: The training images; labellers do not see identities of a target domain.
        model: The network, with its starting weights.
        device: The device that trains.
        more_students: The networks that are trained beside the first one, by name.

    Attributes:
        first: The parts of the first stage.
        images: The images that the last stage labels, prepared as in tests.
        stages: For the trainer; None: the run has no stages.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or parts do not fit each other.
        DataError: The images are not what was expected.
    """

    def __init__(
        self,
        config: Config,
        labellers: Sequence[Labeller],
        records: Sequence[ImageRecord],
        model: ReIDModel,
        device: torch.device,
        more_students: Mapping[str, ReIDModel] | None = None,
    ) -> None:
        self._config = config
        self._configs = stage_configs(config)
        self._labellers = labellers
        self._records = records
        self._source_domains = config.datasets.source_domains
        self._domains = torch.tensor([record.domain for record in records])
        self._hidden = hide_target_identities(records, self._source_domains)
        self._model = model
        self._device = device
        self._more_students = dict(more_students or {})
        self._check_carried()
        groups = {stage.model.bn_samples_per_group for stage in self._configs}
        self._has_groups = groups != {config.model.bn_samples_per_group}
        # Losses of later stages are checked now, not after hours of training.
        with torch.random.fork_rng(devices=[]):
            later = [self._losses_and_sampler(n)[0] for n in range(1, len(self._configs))]
        criterion, sampler = self._losses_and_sampler(0)
        self._try_carrying([criterion, *later])
        for losses, stage in zip([criterion, *later], self._configs, strict=True):
            _warn_of_idle(losses, stage.solver.max_epochs)
        self._sampler = sampler
        training = build_training_set(self._configs[0], records, sampler, device, _views(criterion))
        self._cache = training.cache
        self._eval_cache = training.eval_cache
        self._image_sets = {"all": training.images}
        self.images = self._image_set(self._shown_domain(self._configs[-1].datasets.domains))
        self.first = self._parts(0, criterion, training.loader)
        self.stages: Stages | None = None
        if config.stages:
            runs = plan_stages(config.stage_settings, config.rounds)
            self.stages = Stages(runs, lambda run: self.build(run.number))

    def build(self, number: int) -> StageParts:
        """The parts of a stage, all new.

        Raises:
            ConfigError: A part is unknown, an option is wrong, or parts do not fit each other.
        """
        criterion, sampler = self._losses_and_sampler(number)
        loader = build_train_loader(
            self._configs[number],
            self._records,
            sampler,
            self._device,
            _views(criterion),
            self._cache,
        )
        return self._parts(number, criterion, loader)

    def label_hooks(self, writer: MetricWriter) -> list[RefreshPseudoLabels]:
        """A hook for each labeller, which gives the labels in its stages; the last stage's last."""
        hooks = []
        numbers = range(len(self._labellers))
        lasts = {id(labeller): number for number, labeller in enumerate(self._labellers)}
        for last in sorted(lasts.values()):
            labeller = self._labellers[last]
            settings = self._config.stage_settings
            used = {n: settings[n].labels for n in numbers if self._labellers[n] is labeller}
            hooks.append(
                RefreshPseudoLabels(
                    labeller,
                    self._labelled_images(last),
                    self._sampler,
                    self.first.criterion,
                    writer,
                    self._configs[last].on_collapse,
                    used if self._config.stages else None,
                )
            )
        return hooks

    def source_end(self) -> int | None:
        """The epoch after which a run that begins on the source alone first sees the target.

        None: it sees the target at once, or never.
        """
        runs = plan_stages(self._config.stage_settings, self._config.rounds)
        for run in runs:
            if self._configs[run.number].datasets.domains != "source":
                return run.start or None
        return None

    def _shown_domain(self, domains: Domains) -> Domains:
        """The domain that clusters and their statistics are of."""
        return "target" if domains == "all" and self._source_domains else domains

    def _image_set(self, domains: Domains) -> ImageSet:
        if domains not in self._image_sets:
            self._image_sets[domains] = build_image_set(
                self._configs[0],
                f"training images of the {domains}",
                self._records,
                self._eval_cache,
                self._rows(domains).tolist(),
            )
        return self._image_sets[domains]

    def _rows(self, domains: Domains) -> Tensor:
        """The images (M,) of a domain."""
        is_source = self._domains < self._source_domains
        wanted = {"source": is_source, "target": ~is_source, "all": is_source | True}[domains]
        return wanted.nonzero()[:, 0]

    def _labelled_images(self, number: int) -> LabelledImages:
        domains, labeller = self._configs[number].datasets.domains, self._labellers[number]
        shown = self._shown_domain(domains)
        given: Domains = "all" if labeller.uses_source else domains
        needed = given if labeller.uses_source or labeller.needs_source else shown
        return LabelledImages(
            replace(self._image_set(given), records=self._hidden),
            replace(self._image_set(needed), records=self._hidden),
            self._rows(shown),
            torch.tensor([record.pid for record in self._records]),
        )

    def _losses_and_sampler(self, number: int) -> tuple[Criterion, LabelledSampler]:
        config = self._configs[number]
        try:
            criterion = build_criterion(
                config.criterion,
                embed_dim=self._model.embed_dim,
                num_parts=self._model.num_parts,
                num_cameras=len({record.camid for record in self._records}),
                num_classes=self._labellers[number].count_classes(self._hidden),
                source_domains=self._source_domains,
            ).to(self._device)
            self._check_named(criterion)
            sampler = build_sampler(config)
            sampler.set_domains(self._domains)
            return criterion, sampler
        except ConfigError as error:
            raise in_stage(self._config, number, error) from None

    def _check_carried(self) -> None:
        """Checks that stages with carried losses follow stages with the same losses.

        Raises:
            ConfigError: One does not.
        """
        names = [
            [spec if isinstance(spec, str) else spec["name"] for spec in stage.criterion]
            for stage in self._configs
        ]
        for number, settings in enumerate(self._config.stage_settings):
            if settings.losses != "carried":
                continue
            if not number:
                raise ConfigError("stages[0].losses: expected new, since no stage comes before it")
            before = names[number - 1]
            if names[number][: len(before)] != before:
                raise ConfigError(
                    f"stages[{number}].losses: carried needs the losses of the stage before "
                    f"({', '.join(before)}) first; got {', '.join(names[number])}"
                )

    def _try_carrying(self, criteria: Sequence[Criterion]) -> None:
        """Carries the losses of stages into copies of the next ones.

        Raises:
            ConfigError: Losses that should be carried have other parameters.
        """
        for number, settings in enumerate(self._config.stage_settings):
            if settings.losses == "carried":
                try:
                    carry_losses(criteria[number - 1], criteria[number])
                except ValueError as error:
                    message = str(error).removeprefix("stages: ")
                    raise ConfigError(f"stages[{number}].losses: {message}") from error

    def _check_named(self, criterion: Criterion) -> None:
        """Checks that losses can take the outputs and weights of the network that they name.

        Raises:
            ConfigError: The network lacks one, a loss cannot take it, or the network is compiled,
                where outputs cannot be recorded.
        """
        mode = self._config.model.compile
        for number, loss in enumerate(criterion):
            names, weights = loss.network_outputs, loss.network_weights
            if not names and not weights:
                continue
            if names and mode != "off":
                raise ConfigError(
                    f"model.compile: expected off with {type(loss).__name__}, which takes outputs "
                    f"of the network's modules; got {mode}"
                )
            try:
                with torch.random.fork_rng(devices=[]):
                    batch = blank_batch(self._config, self._records).to(self._device)
                    loss.check_aux(try_out(self._model, batch, names, weights))
            except ValueError as error:
                message = str(error)
                if not message.startswith("model."):
                    message = f"criterion[{number}] ({type(loss).__name__}): {message}"
                raise ConfigError(message) from error

    def _parts(self, number: int, criterion: Criterion, loader: BatchLoader) -> StageParts:
        model = self._configs[number].model
        for student in (self._model, *self._more_students.values()):
            if self._has_groups:
                group_batch_norms(student, model.bn_samples_per_group, model.bn_running)
            if student.domain_split is not None:
                student.domain_split.sizes = _domain_sizes(loader)
        optimization = build_optimization(
            self._configs[number], self._model, criterion, self._device, self._more_students
        )
        return StageParts(criterion, optimization, loader)


def _views(criterion: Criterion) -> int:
    return 1 + max(view for _, view in criterion.asks_for)


def _domain_sizes(loader: BatchLoader) -> tuple[int, int] | None:
    """How many images of the source and of the target a process has of a batch; None: unknown."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, TwoDomainSampler):
        return None
    processes = distributed.world_size()
    return sampler.source.batch_size // processes, sampler.target.batch_size // processes


def _warn_of_idle(criterion: Criterion, epochs: int) -> None:
    """Warns of losses that begin only after the last epoch."""
    criterion.set_epoch(epochs - 1)
    for loss in criterion:
        if not loss.is_active:
            logger.warning(
                "%s takes no part in the training: it begins later than in epoch %d, the last one",
                type(loss).__name__,
                epochs - 1,
            )
    criterion.set_epoch(0)
