"""A trained model with all that its config says about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """A model with all that its config says about images.

    Attributes:
        name: For titles.
        config: Of the model; `model.weights` are those that it has.
        model: In eval mode.
        device: Where it is.
        run: Folder of the run that the weights lie in, if any.
    """

    name: str
    config: Config
    model: ReIDModel
    device: torch.device
    run: Path | None = None

    @cached_property
    def train_images(self) -> TrainImages | None:
        """What the config trains on; None: it does not say.

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
        """The file that the model, or its backbone alone, has its weights from."""
        return Path(self.config.model.weights or self.config.model.backbone_weights)

    def batch(self, records: Sequence[ImageRecord], dataset: ReIDDataset | None = None) -> Batch:
        """Some images as the model sees them in tests.

        Args:
            records: The images.
            dataset: They are of it; None: of none, so that their cameras are unknown.

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
        """From a picture to the model's input in tests."""
        return build_transform(self.config.input, training=False)

    def test_set(self) -> QueryGallery:
        """The first test set, whether it can be scored or not.

        Raises:
            ConfigError: There is none.
        """
        return first_test_set(
            build_test_sets(self.config, self.train_images, self.cameras, check=False)
        )

    def test_features(self) -> tuple[FeatureSet, FeatureSet]:
        """Query and gallery features of the first test set.

        Raises:
            ConfigError: There is none.
            DataError: An image cannot be read.
        """
        test_set = self.test_set()
        with progress_bar(f"Extracting {test_set.name}", "img") as progress:
            return test_set.features(self.model, self.device, progress)


def load_trained(
    place: Path, weights: Path | None = None, overrides: Sequence[str] = ()
) -> TrainedModel:
    """A model of a run, of a config file with weights, or of weights that say how they were made.

    Args:
        place: Folder of a run, whose config.yaml and best (or else final) weights are taken; a
            config file; or a .safetensors file of a run.
        weights: Checkpoint, in place of the run's.
        overrides: KEY VALUE pairs that win over the config.

    Raises:
        ConfigError: The folder holds no run, a setting is wrong, or there are no weights.
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
            f"{place}: does not say which network it is of; give a config file before it"
        )
    register_parts(config)
    device = pick_device(config.device)
    model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
    name = place.name if place.is_dir() else place.stem
    folder = Path(config.model.weights).parent
    run = folder if (folder / "config.yaml").is_file() else None
    return TrainedModel(name, config, model.to(device).eval(), device, run)


def first_test_set(test_sets: Sequence[T]) -> T:
    """The first one.

    Raises:
        ConfigError: There is none.
    """
    if not test_sets:
        raise ConfigError("datasets.test: there is no test set to take images from")
    return test_sets[0]
