from __future__ import annotations

import numpy as np
import pytest

from reid.data.synthetic import (
    CameraStyle,
    PictureStyle,
    draw_image,
    synthesise_camera,
    synthesise_person,
)
from reid.data.synthetic.scenes import draw_scene

# Mean red, green and blue of an upper and a lower box, of the pictures of seeds 0, 1, 2...
COLOURS = [
    (201, 159, 155, 215, 129, 132),
    (73, 85, 178, 94, 83, 133),
    (70, 45, 59, 74, 61, 66),
    (157, 52, 44, 197, 101, 87),
    (122, 60, 47, 142, 75, 42),
    (90, 66, 37, 123, 99, 53),
    (102, 68, 78, 80, 58, 76),
    (135, 136, 131, 138, 130, 123),
    (104, 104, 98, 107, 128, 119),
    (130, 154, 94, 152, 154, 104),
    (75, 46, 44, 54, 41, 54),
    (141, 139, 96, 162, 126, 86),
    (70, 49, 34, 109, 89, 74),
    (55, 51, 41, 39, 55, 30),
    (110, 74, 64, 97, 65, 61),
    (122, 88, 116, 137, 122, 159),
    (80, 63, 69, 126, 97, 69),
    (83, 86, 107, 103, 103, 136),
    (139, 102, 110, 93, 92, 79),
    (123, 98, 118, 142, 128, 129),
    (130, 138, 108, 89, 103, 84),
    (86, 75, 67, 107, 81, 65),
    (162, 178, 146, 169, 182, 164),
    (67, 68, 76, 58, 70, 81),
]


def test_pictures_are_those_of_earlier_versions() -> None:
    """Each machine draws the sets anew, and results on them are compared.

    Means, since the last bit of a pixel may change with Pillow's version.
    """
    for seed, expected in enumerate(COLOURS):
        rng = np.random.default_rng(seed)
        image = draw_image(synthesise_person(rng), synthesise_camera(rng), rng, 64, 32)
        means = [image[rows, 8:24].mean((0, 1)) for rows in (slice(12, 32), slice(32, 56))]
        np.testing.assert_allclose(np.concatenate(means), expected, atol=2, err_msg=f"seed {seed}")


def test_pixels_do_not_depend_on_what_was_drawn_before() -> None:
    def one(pid: int, cam: int) -> np.ndarray:
        person = synthesise_person(np.random.default_rng(pid))
        camera = synthesise_camera(np.random.default_rng(cam))
        return draw_image(person, camera, np.random.default_rng((pid, cam)), 64, 32)

    pairs = [(pid, cam) for pid in range(3) for cam in range(3)]
    forward = {pair: one(*pair) for pair in pairs}
    draw_scene.cache_clear()
    for pair in reversed(pairs):
        np.testing.assert_array_equal(one(*pair), forward[pair])


def test_a_picture_of_nobody() -> None:
    calm = PictureStyle(**dict.fromkeys(("flicker", "pole", "crowd", "shade"), 0.0))
    silent = CameraStyle(noise=(0.0, 0.0), blur=(0.0, 0.0))
    camera = synthesise_camera(np.random.default_rng(1), silent, calm)
    scene, picture = (
        draw_image(person, camera, np.random.default_rng(0), 64, 32).astype(float)
        for person in (None, synthesise_person(np.random.default_rng(2)))
    )
    changed = np.abs(scene - picture).max(2) > 3
    assert changed[16:48, 10:22].mean() > 0.5
    assert not changed[:, :3].any()


def test_cameras_differ_more_than_persons_in_colour() -> None:
    cameras = [synthesise_camera(np.random.default_rng(cam)) for cam in range(8)]
    persons = [synthesise_person(np.random.default_rng(100 + pid)) for pid in range(8)]
    means = np.array(
        [
            [
                draw_image(person, camera, np.random.default_rng((p, c)), 64, 32).mean((0, 1))
                for c, camera in enumerate(cameras)
            ]
            for p, person in enumerate(persons)
        ]
    )
    assert means.mean(0).std(0).mean() > 2 * means.mean(1).std(0).mean()


def test_persons_are_recognisable_without_nuisances() -> None:
    """Without the nuisances, another picture of a person is nearer than another person."""
    style = CameraStyle(
        **dict.fromkeys(("cast", "exposure", "haze", "blur", "noise", "pitch"), (0.0, 0.0)),
        **dict.fromkeys(("gamma", "saturation", "resolution"), (1.0, 1.0)),
    )
    calm = PictureStyle(
        **dict.fromkeys(("turn", "flicker", "shift", "zoom", "pole", "crowd", "shade"), 0.0)
    )
    camera = synthesise_camera(np.random.default_rng(0), style, calm)
    features = np.array(
        [
            [
                draw_image(
                    synthesise_person(np.random.default_rng(pid)),
                    camera,
                    np.random.default_rng((pid, k)),
                    64,
                    32,
                )[16:48, 10:22].mean((0, 1))
                for k in range(4)
            ]
            for pid in range(12)
        ]
    )
    within = features.std(1).mean()
    assert features.mean(1).std(0).mean() > 2 * within


@pytest.mark.parametrize("size", [(16, 8), (96, 32), (64, 64), (256, 128)])
def test_an_image_has_the_size_asked(size: tuple[int, int]) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        image = draw_image(synthesise_person(rng), synthesise_camera(rng), rng, *size)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert image.std() > 3


def test_a_size_too_small_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="height: expected an integer of at least 16, got 4"):
        draw_image(synthesise_person(rng), synthesise_camera(rng), rng, 4, 8)
