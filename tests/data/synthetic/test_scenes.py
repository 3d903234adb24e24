from __future__ import annotations

import numpy as np
from PIL import Image

from reid.data.synthetic.scenes import draw_obstacle, draw_scene


def test_a_scene_has_room_for_many_backgrounds() -> None:
    for seed in range(8):
        scene = draw_scene(seed, 64, 32)
        assert scene.mode == "RGB"
        assert scene.size == (6 * 32, 64 * 5 // 4)
        assert np.asarray(scene).std() > 5


def test_scenes_differ() -> None:
    pictures = [np.asarray(draw_scene(seed, 32, 16)).astype(float) for seed in range(4)]
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(picture - other).mean() > 5


def test_a_camera_has_one_obstacle_at_many_places() -> None:
    colours, places = set(), set()
    for place in range(6):
        layer = Image.new("RGBA", (96, 192))
        draw_obstacle(layer, 3, np.random.default_rng(place))  # scene 3 has a low wall or car
        pixels = np.asarray(layer)
        covered = pixels[:, :, 3] > 0
        assert covered.any()
        colours.add(tuple(int(part) for part in pixels[covered][-1]))
        places.add(int(covered.sum()))
    assert len(colours) == 1
    assert len(places) > 1
