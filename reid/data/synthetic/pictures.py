"""One picture of a made person through a made camera."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

from reid.data.synthetic.cameras import Camera, PictureStyle
from reid.data.synthetic.figures import Figure
from reid.data.synthetic.paint import between
from reid.data.synthetic.persons import Person, synthesise_person
from reid.data.synthetic.scenes import draw_obstacle, draw_scene

MIN_HEIGHT, MIN_WIDTH = 16, 8
"""Smallest picture, in pixels: in a smaller one nobody could be recognised."""

Joints = npt.NDArray[np.float32]
"""COCO's joints (17, 3): x, y in pixels, and how visible from 0 to 1; see `draw_image`.

A joint is hidden by what stands in front of the person and by the border of the picture, never by
the person's own body.
"""

_SUPERSAMPLE = 3  # pixels of the layers of figures and obstacles for each of the picture


def draw_image(
    person: Person | None,
    camera: Camera,
    rng: np.random.Generator,
    height: int,
    width: int,
    box_error: float = 1.0,
    note_joints: Callable[[Joints], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Draws one picture of `person` as `camera` sees it.

    Args:
        person: Who is in the picture; None: nobody.
        camera: Through which camera.
        rng: Random numbers of this picture: pose, direction, box, obstacles, noise.
        height: Pixels, at least 16.
        width: Pixels, at least 8.
        box_error: Factor of the errors of the box.
        note_joints: Called with the person's joints, unless nobody is in the picture.

    Returns:
        RGB pixels (height, width, 3) in [0, 255].

    Raises:
        ValueError: The picture would be too small.
    """
    at_least("height", height, MIN_HEIGHT)
    at_least("width", width, MIN_WIDTH)
    scene = draw_scene(camera.scene, height, width)
    x = int(rng.integers(scene.size[0] - width + 1))
    y = int(rng.integers(scene.size[1] - height + 1))
    picture = scene.crop((x, y, x + width, y + height))
    joints = _draw_people(picture, person, camera, rng, box_error)
    if rng.random() < camera.style.pole:
        layer = _layer(picture)
        draw_obstacle(layer, camera.scene, rng)
        _put(picture, layer)
        _cover(joints, layer)
    if note_joints is not None and joints is not None:
        note_joints(joints)
    if rng.random() < camera.style.shade:
        picture = _shaded(picture, rng)
    exposure = 2.0 ** between(rng, (-camera.style.flicker, camera.style.flicker))
    return camera.chain.develop(picture, exposure, rng)


def at_least(name: str, value: int, least: int) -> None:
    """Checks that a number is an integer of at least `least`.

    Raises:
        ValueError: It is too small, or not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _draw_people(
    picture: Image.Image,
    person: Person | None,
    camera: Camera,
    rng: np.random.Generator,
    box_error: float,
) -> Joints | None:
    """Draws the person, in a crowd with a passer-by behind or in front; returns its joints."""
    style = camera.style
    high = picture.size[1] * _SUPERSAMPLE
    scale = 0.92 * high * 2.0 ** (box_error * between(rng, (-style.zoom, 0.5 * style.zoom)))
    aside = box_error * between(rng, (-style.shift, style.shift))
    top = 0.5 * (high - scale) + box_error * between(rng, (-style.shift, style.shift)) * scale
    crowd = rng.random() < style.crowd
    in_front = rng.random() < 0.35
    side = 1.0 if rng.random() < 0.5 else -1.0
    distance = side * between(rng, (0.15, 0.32))
    passer_by = synthesise_person(rng)
    if crowd and not in_front:
        _draw_walker(picture, passer_by, camera, rng, distance, 0.94 * scale, top)
    joints = None
    if person is not None:
        figure = _draw_walker(picture, person, camera, rng, aside, scale, top)
        joints = _joints_in(picture, figure)
    if crowd and in_front:
        aside, scale = distance + 0.08 * side, 1.04 * scale
        figure = _draw_walker(picture, passer_by, camera, rng, aside, scale, top)
        _cover(joints, figure.layer)
    return joints


def _draw_walker(
    picture: Image.Image,
    person: Person,
    camera: Camera,
    rng: np.random.Generator,
    aside: float,
    scale: float,
    top: float,
) -> Figure:
    """Draws a person who walks along the camera's path, there or back.

    Args:
        picture: Drawn on in place.
        person: Who walks.
        camera: Who sees it.
        rng: Random numbers of direction and step.
        aside: Distance from the middle to the right, in heights of the body.
        scale: Height of the body in pixels of a layer.
        top: Top of the head, in pixels of a layer.
    """
    yaw = _direction(camera.path, camera.style, rng)
    phase = between(rng, (0.0, 2.0 * math.pi))
    layer = _layer(picture)
    origin = (layer.size[0] * 0.5 + aside * scale, top)
    figure = Figure(layer, person, camera.pitch, yaw, phase, origin, scale)
    figure.draw(camera.light)
    _put(picture, layer)
    return figure


def _joints_in(picture: Image.Image, figure: Figure) -> Joints:
    """The joints of a figure in pixels of the picture; those outside are not visible."""
    places = figure.joints() / _SUPERSAMPLE
    inside = ((places >= 0) & (places < picture.size)).all(1)
    return np.column_stack((places, inside)).astype(np.float32)


def _cover(joints: Joints | None, layer: Image.Image) -> None:
    """Makes joints behind a layer less visible, in place."""
    if joints is None:
        return
    opacity = np.asarray(layer.getchannel("A"))
    column, row = (joints[:, :2] * _SUPERSAMPLE).astype(int).T
    inside = joints[:, 2] > 0
    joints[inside, 2] *= 1 - opacity[row[inside], column[inside]] / np.float32(255)


def _direction(path: float, style: PictureStyle, rng: np.random.Generator) -> float:
    back = math.pi * int(rng.integers(2))
    return path + back + between(rng, (-style.turn, style.turn))


def _shaded(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with a shadow on one side of a random line."""
    width, height = picture.size
    cut, slope = between(rng, (0.1, 0.9)), between(rng, (-0.5, 0.5))
    mask = Image.new("L", (width, height), 255)
    ends = ((width * (cut - slope), 0), (width * (cut + slope), height))
    corner = width * 3 if rng.random() < 0.5 else -width * 3
    level = int(between(rng, (110.0, 190.0)))
    ImageDraw.Draw(mask).polygon((*ends, (corner, height), (corner, 0)), fill=level)
    return ImageChops.multiply(picture, mask.convert("RGB"))


def _layer(picture: Image.Image) -> Image.Image:
    """A transparent layer over the picture."""
    width, height = picture.size
    return Image.new("RGBA", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))


def _put(picture: Image.Image, layer: Image.Image) -> None:
    small = layer.reduce(_SUPERSAMPLE)
    picture.paste(small, mask=small)
