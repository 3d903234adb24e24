"""Builds the stages of a run; a run without stages is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from reid.assembly.criterion import build_criterion
from reid.assembly.images import build_train_loader, build_training_set
from reid.assembly.labelling import build_labeller, labeller_spec
from reid.assembly.optimization import build_optimization
from reid.assembly.sampler import build_sampler
from reid.config import Config
from reid.data.loaders import BatchLoader
from reid.data.samplers import LabelledSampler
from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.engine.stages import StageParts, Stages
from reid.labelling import Labeller
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.losses import Criterion
from reid.modeling.model import ReIDModel
from reid.registry import ConfigError
from reid.stage_settings import plan_stages
from reid.structures import ImageRecord


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage; a run without stages is one."""
    return [config.of_stage(number) for number in range(len(config.stages) or 1)]


def build_labellers(config: Config, records: Sequence[ImageRecord], name: str) -> list[Labeller]:
    """The labeller of each stage; stages with the same labeller share it.

    Args:
        config: The run's config.
        records: The training images.
        name: The dataset's name, for messages.

    Raises:
        ConfigError: A part is unknown or an option is wrong, or there are no identities to be the
            labels.
    """
    configs = stage_configs(config)
    keys = [(labeller_spec(stage), stage.on_collapse) for stage in configs]
    labellers: list[Labeller] = []
    for number, stage in enumerate(configs):
        first = keys.index(keys[number])
        if first < number:
            labellers.append(labellers[first])
            continue
        try:
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
        records: The training images.
        model: The network, with its starting weights.
        device: The device that trains.
        more_students: The networks that are trained beside the first one, by name.

    Attributes:
        first: The parts of the first stage.
        images: The training images, prepared as in tests.
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
        self._model = model
        self._device = device
        self._more_students = dict(more_students or {})
        groups = {stage.model.bn_samples_per_group for stage in self._configs}
        self._has_groups = groups != {config.model.bn_samples_per_group}
        criterion, sampler = self._losses_and_sampler(0)
        self._sampler = sampler
        training = build_training_set(self._configs[0], records, sampler, device, _views(criterion))
        self._cache = training.cache
        self.images = training.images
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
                    self.images,
                    self._sampler,
                    self.first.criterion,
                    writer,
                    self._configs[last].on_collapse,
                    used if self._config.stages else None,
                )
            )
        return hooks

    def _losses_and_sampler(self, number: int) -> tuple[Criterion, LabelledSampler]:
        config = self._configs[number]
        try:
            criterion = build_criterion(
                config.criterion,
                embed_dim=self._model.embed_dim,
                num_parts=self._model.num_parts,
                num_cameras=len({record.camid for record in self._records}),
                num_classes=self._labellers[number].count_classes(self._records),
            ).to(self._device)
            return criterion, build_sampler(config)
        except ConfigError as error:
            raise in_stage(self._config, number, error) from None

    def _parts(self, number: int, criterion: Criterion, loader: BatchLoader) -> StageParts:
        if self._has_groups:
            model = self._configs[number].model
            for student in (self._model, *self._more_students.values()):
                group_batch_norms(student, model.bn_samples_per_group, model.bn_running)
        optimization = build_optimization(
            self._configs[number], self._model, criterion, self._device, self._more_students
        )
        return StageParts(criterion, optimization, loader)


def _views(criterion: Criterion) -> int:
    return 1 + max(view for _, view in criterion.asks_for)
