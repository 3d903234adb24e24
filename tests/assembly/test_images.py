"""Which transforms a view of a training image has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reid.assembly.images import build_training_set, build_transform
from reid.config import Config, DataloaderConfig, InputConfig
from reid.data.images import Decoding
from reid.data.resize import Pixels
from reid.data.samplers import PKSampler
from reid.registry import ConfigError
from reid.structures import ImageRecord, PseudoLabels


def test_each_view_has_its_transforms() -> None:
    flip = [{"name": "RandomFlip", "prob": 1.0}]
    config = InputConfig(size=(4, 2), transforms=flip, views=[None, []])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    plain = np.empty((3, 4, 2), np.float32)
    build_transform(config, training=False).normalize(pixels, plain)
    for view, flipped in enumerate((True, True, False, True)):
        transform = build_transform(config, training=True, view=view)
        image = np.empty_like(plain)
        transform.finish(pixels, image, np.random.default_rng(0), lambda: pixels)
        assert np.array_equal(image, plain[:, :, ::-1] if flipped else plain), view


def test_what_is_wrong_with_a_view_names_it() -> None:
    config = InputConfig(views=[None, ["RandomErasing", "RandomFlip"]])
    with pytest.raises(ConfigError, match=r"input\.views\[1\]: expected those on pixels before"):
        build_transform(config, training=True, view=2)
    with pytest.raises(ConfigError, match=r"input\.views: expected a list with null or a list"):
        InputConfig(views=["RandomFlip"])


@pytest.mark.parametrize("decoding", ["exact", "reduced"])
def test_training_images_alone_are_decoded_at_a_fraction(
    decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = []

    def read(
        path: str, data: bytearray | None = None, wanted: tuple[int, int] | None = None
    ) -> Pixels:
        least.append(wanted)
        return np.zeros((8, 4, 3), np.uint8)

    monkeypatch.setattr("reid.data.transforms.read_image", read)
    config = Config(
        input=InputConfig(size=(4, 2), decoding=decoding),
        dataloader=DataloaderConfig(num_workers=0),
    )
    records = [ImageRecord(f"{number}.jpg", number, 0) for number in range(4)]
    sampler = PKSampler(4, images_per_identity=1)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(4)))
    training = build_training_set(config, records, sampler, torch.device("cpu"))
    for loader in (training.loader, training.images.loader):
        next(iter(loader))
        assert {*least} == {(4, 2) if decoding == "reduced" else None}
        least.clear()
    build_transform(config.input, training=False).read("test.jpg")
    assert least == [None]
