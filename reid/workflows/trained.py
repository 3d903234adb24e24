"""A trained model with all that its config says about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from reid.assembly.cameras import Camera, renumber_cameras
from reid.assembly.data import TrainImages
from reid.assembly.images import build_test_sets, build_train_images, build_transform
from reid.assembly.network import build_trained_model, known_cameras, pick_device
from reid.assembly.plugins import register_parts
from reid.assembly.trained import adopt_training
from reid.config import Config, load_config
from reid.data.datasets.base import ReIDDataset
from reid.data.loaders import eval_loader
from reid.data.transforms import ImageTransform
from reid.engine.hooks.checkpoints import BEST_MODEL, FINAL_MODEL
from reid.engine.logs import progress_bar
from reid.evaluation.query_gallery import QueryGallery
from reid.modeling.model import ReIDModel
from reid.registry import ConfigError
from reid.structures import Batch, FeatureSet, ImageRecord

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its config.

    Attributes:
        name: The model's name in titles.
        config: The model's config; `model.weights` names its weights.
        model: The model in eval mode.
        device: The model's device.
        run: Folder of the run that holds the weights, if any.
    """

    name: str
    config: Config
    model: ReIDModel
    device: torch.device
    run: Path | None = None

    @cached_property
    def train_images(self) -> TrainImages | None:
        """The training images of the config; None: it names none.

        Raises:
            ConfigError: A dataset is unknown or an option is wrong.
        """
        return build_train_images(self.config) if self.config.datasets.train else None

    @cached_property
    def cameras(self) -> list[Camera] | None:
        """The cameras that the model has learned; see `known_cameras`.

        Raises:
            DataError: The training sets' files are not what was expected.
        """
        return known_cameras(self.config, self.train_images)

    @property
    def weights(self) -> Path:
        """The weights file of the model, or of its backbone if only that has weights."""
        return Path(self.config.model.weights or self.config.model.backbone_weights)

    def batch(self, records: Sequence[ImageRecord], dataset: ReIDDataset | None = None) -> Batch:
        """Loads some images, prepared as in tests.

        Args:
            records: The images.
            dataset: The data set of the images; None: they belong to none, and their cameras are
                unknown.

        Raises:
            ConfigError: A training set of the config is unknown or an option is wrong.
            DataError: An image or a training set cannot be read.
        """
        if dataset is not None:
            records = renumber_cameras(self.cameras, records, dataset)
        loader = eval_loader(records, self.transform(), batch_size=len(records))
        batch: Batch = next(iter(loader))
        return batch.to(self.device)

    def transform(self) -> ImageTransform:
        """The transform that prepares pictures as in tests."""
        return build_transform(self.config.input, training=False)

    def test_set(self) -> QueryGallery:
        """The first test set, even if it cannot be scored.

        Raises:
            ConfigError: The config has no test set.
        """
        return first_test_set(
            build_test_sets(self.config, self.train_images, self.cameras, check=False)
        )

    def test_features(self) -> tuple[FeatureSet, FeatureSet]:
        """Extracts query and gallery features of the first test set.

        Raises:
            ConfigError: The config has no test set.
            DataError: An image cannot be read.
        """
        test_set = self.test_set()
        with progress_bar(f"Extracting {test_set.name}", "img") as progress:
            return test_set.features(self.model, self.device, progress)


def load_trained(
    place: Path, weights: Path | None = None, overrides: Sequence[str] = ()
) -> TrainedModel:
    """Loads the model of a run, of a config file and weights, or of a run's weights alone.

    Args:
        place: Folder of a run, a config file, or a .safetensors file of a run. From a run's folder,
            config.yaml and the best weights are loaded, or the final weights if there are no best
            ones.
        weights: Weights to load instead of the run's.
        overrides: KEY VALUE pairs that win over the config.

    Raises:
        ConfigError: The folder holds no run, a setting is wrong, or no weights are given.
        WeightsError: The weights do not fit.
    """
    alone = place.suffix == ".safetensors" and weights is None
    file = place / "config.yaml" if place.is_dir() else place
    config = load_config(None if alone else file, overrides)
    if weights is None and place.is_dir():
        found = [place / name for name in (BEST_MODEL, FINAL_MODEL) if (place / name).is_file()]
        if not found:
            raise ConfigError(f"{place}: has neither {BEST_MODEL} nor {FINAL_MODEL}")
        weights = found[0]
    if alone:
        weights = place
    if weights is not None:
        config.model.weights = str(weights)
    adopt_training(config)
    if alone and not config.model.backbone:
        raise ConfigError(
            f"{place}: does not say which network it belongs to; give a config file before it"
        )
    register_parts(config)
    device = pick_device(config.device)
    model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
    name = place.name if place.is_dir() else place.stem
    folder = Path(config.model.weights).parent
    run = folder if (folder / "config.yaml").is_file() else None
    return TrainedModel(name, config, model.to(device).eval(), device, run)


def split_settings(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The paths of a model, and the KEY VALUE pairs that were written behind them."""
    sections = {field.name for field in fields(Config)}
    for place, word in enumerate(words):
        is_key = word.lower().partition(".")[0] in sections
        if place and is_key and not Path(word).exists():
            return [Path(path) for path in words[:place]], [*words[place:]]
    return [Path(path) for path in words], []


def first_test_set(test_sets: Sequence[T]) -> T:
    """The first of the test sets.

    Raises:
        ConfigError: The config has no test set.
    """
    if not test_sets:
        raise ConfigError("datasets.test: expected a test set to take images from, but none is set")
    return test_sets[0]
