"""A small trained run, whose network knows cameras, and what `--eval-only` makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from reid.config import load_config
from reid.evaluation.query_gallery import QueryGallery
from reid.structures import FeatureSet
from reid.workflows.train import train
from reid.workflows.trained import load_trained

PERSONS = (
    "{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 6, NUM_CAMERAS: 3, NUM_DISTRACTORS: 3, "
    "HEIGHT: 40, WIDTH: 20}"
)
SETTINGS = f"""
DATASETS: {{TRAIN: {PERSONS}}}
INPUT: {{SIZE: [48, 32], PIXEL_MEAN: [0.4, 0.5, 0.6], TEST_INTERPOLATION: bilinear}}
DATALOADER: {{NUM_WORKERS: 0, SAMPLER: {{NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 2}}}}
MODEL:
  BACKBONE: {{NAME: ViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, CAMERA_EMBEDDING: true}}
CRITERION: [Triplet]
SOLVER: {{OPTIMIZER: Adam, BASE_LR: 0.01, MAX_EPOCHS: 1, WARMUP_EPOCHS: 0, MILESTONES: []}}
TEST: {{BATCH_SIZE: 7, FLIP: true}}
DEVICE: cpu
"""


class Run(NamedTuple):
    """A finished run and the features that its evaluation compares."""

    folder: Path
    test_set: QueryGallery
    query: FeatureSet
    gallery: FeatureSet

    @property
    def weights(self) -> Path:
        return self.folder / "model_best.safetensors"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("use")
    (root / "run.yaml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        train(load_config(root / "run.yaml", ["OUTPUT_DIR", str(root / "run")]))
        trained = load_trained(root / "run")
        test_set = trained.test_set()
        yield Run(root / "run", test_set, *test_set.features(trained.model, trained.device))
