from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from reid.data.synthetic import CameraStyle, ImageChain, PictureStyle, synthesise_camera

PLAIN = {
    "gains": (1.0, 1.0, 1.0),
    "gamma": 1.0,
    "saturation": 1.0,
    "haze": 0.0,
    "haze_level": 100.0,
    "blur": 0.0,
    "noise": 0.0,
    "resolution": 1.0,
}


def develop(exposure: float = 1.0, **changes: object) -> np.ndarray:
    """A picture of one colour, through a chain with only the given changes."""
    chain = ImageChain(**{**PLAIN, **changes})  # type: ignore[arg-type]
    image = Image.new("RGB", (8, 16), (120, 60, 30))
    return chain.develop(image, exposure, np.random.default_rng(0))


def test_numbers_are_in_the_bounds_of_the_style() -> None:
    style, pictures = CameraStyle(gamma=(2.0, 3.0), light=(0.5, 0.5)), PictureStyle(crowd=1.0)
    for seed in range(50):
        camera = synthesise_camera(np.random.default_rng(seed), style, pictures)
        assert 2.0 <= camera.chain.gamma <= 3.0
        assert camera.light == 0.5
        assert 0.0 <= camera.pitch <= 0.4
        assert camera.style is pictures


def test_a_plain_chain_changes_nothing() -> None:
    assert (develop() == (120, 60, 30)).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exposure": 2.0}, (240, 120, 60)),
        ({"gains": (0.5, 1.0, 2.0)}, (60, 60, 60)),
        ({"saturation": 0.0}, (74, 74, 74)),  # luma of ITU-R 601
        ({"haze": 0.5}, (110, 80, 65)),
        ({"gamma": 2.0}, (56, 14, 4)),
    ],
)
def test_light_and_colours(changes: dict[str, object], expected: tuple[int, ...]) -> None:
    assert np.abs(develop(**changes)[8, 4].astype(int) - expected).max() <= 1  # type: ignore[arg-type]


def test_noise_has_its_standard_deviation() -> None:
    assert develop(noise=8.0).astype(float).std((0, 1)) == pytest.approx([8.0] * 3, abs=1.5)
