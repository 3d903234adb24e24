"""Drawn images with features made up for them: what a review asks about, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reid.config import load_config
from reid.evaluation.evaluators import Market1501Evaluator
from reid.evaluation.matches import cluster_confidence
from reid.structures import FeatureSet, ImageRecord
from reid.workflows.review.source import Source, cross_camera_neighbors


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Source]:
    """`persons` persons, `each` images of each in each of `cameras` cameras.

    The i-th image shows person `i // (each * cameras)`; clusters are the persons, but for a share
    of images that is in a wrong one.
    """

    def make(
        persons: int = 12,
        cameras: int = 3,
        each: int = 2,
        *,
        noise: float = 0.35,
        wrong: float = 0.0,
        fingerprint: str = "model",
        named: bool = True,
    ) -> Source:
        rng = np.random.default_rng(0)
        records = []
        folder = tmp_path / "images"
        for person in range(persons):
            for camera in range(cameras):
                for shot in range(each):
                    path = folder / f"cam{camera}" / f"{person:03d}_{shot}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    colour = ((37 * person) % 256, 80 * camera % 256, 60 * shot % 256)
                    Image.new("RGB", (8, 16), colour).save(path)
                    extra = {"camera": f"cam{camera}"} if named else {}
                    records.append(ImageRecord(str(path), camid=camera, extra=extra))
        truth = np.repeat(np.arange(persons), cameras * each)
        centres = rng.normal(size=(persons, 16))
        spread = rng.normal(size=(len(records), 16))
        test = F.normalize(torch.from_numpy(centres[truth] + noise * spread).float(), dim=1)
        cluster = truth.copy()
        moved = rng.random(len(cluster)) < wrong
        cluster[moved] = (cluster[moved] + 1) % persons
        camids = torch.tensor([record.camid for record in records])
        features = FeatureSet.of(test, camids=camids)
        return Source(
            "drawn",
            tmp_path / "run",
            load_config(None, ["MODEL.WEIGHTS", str(tmp_path / "run" / "model.safetensors")]),
            records,
            features,
            cluster,
            cluster_confidence(test, torch.from_numpy(cluster)).numpy(),
            "a test",
            cross_camera_neighbors(features, [record.path for record in records], 10),
            Market1501Evaluator(),
            fingerprint,
        )

    return make
