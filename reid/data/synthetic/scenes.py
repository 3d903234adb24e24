"""Made scenes: the street behind the persons of a camera, and what stands in front of them."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

from reid.data.synthetic.paint import CLOTHES, Colour, between, disc, near, pick, tint

_WIDTH = 6  # of a camera's scene, in widths of an image

_WALLS = ((150, 140, 130), (120, 125, 135), (170, 120, 95), (95, 110, 90), (200, 195, 185))
_GROUNDS = ((110, 110, 112), (150, 140, 125), (90, 110, 75), (70, 72, 78), (165, 165, 160))


@functools.lru_cache(maxsize=64)
def draw_scene(seed: int, height: int, width: int) -> Image.Image:
    """Draws the scene of a camera, from which each picture cuts its background.

    Args:
        seed: Seed of the scene.
        height: Height of a picture in pixels.
        width: Width of a picture in pixels.

    Returns:
        The scene, six pictures wide and a quarter higher than one; callers must not draw on it.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    wide, high = 2 * _WIDTH * width, int(2.5 * height)
    horizon = int(between(rng, (0.3, 0.65)) * high)
    wall, ground = near(rng, pick(rng, _WALLS), 40), near(rng, pick(rng, _GROUNDS), 30)
    scene = Image.new("RGB", (wide, high), wall)
    canvas = ImageDraw.Draw(scene)
    step = int(between(rng, (0.06, 0.25)) * high)
    _draw_wall(canvas, rng, wall, step, wide, horizon)
    canvas.rectangle((0, horizon, wide, high), fill=ground)
    _draw_ground(canvas, rng, ground, step, (wide, high), horizon)
    for _ in range(int(rng.integers(8, 20))):
        _draw_thing(canvas, rng, (wide, high), horizon)
    # Paler than clothes, as most streets are.
    grey = scene.convert("L").convert("RGB")
    return Image.blend(grey, scene, between(rng, (0.4, 0.8))).reduce(2)


def draw_obstacle(layer: Image.Image, seed: int, rng: np.random.Generator) -> None:
    """Draws an obstacle in front of the person; a scene has one, the same in all its pictures.

    Args:
        layer: RGBA, drawn on in place.
        seed: Seed of the scene.
        rng: Random numbers of the place, and of leaves.
    """
    wide, high = layer.size
    of_scene = np.random.Generator(np.random.PCG64((seed, 1)))
    kind, colour = int(of_scene.integers(3)), near(of_scene, pick(of_scene, CLOTHES), 25)
    canvas = ImageDraw.Draw(layer)
    x = float(rng.random()) * wide
    if kind == 0:  # pole
        canvas.rectangle((x - 0.06 * wide, 0, x + 0.06 * wide, high), fill=colour)
        canvas.rectangle((x + 0.02 * wide, 0, x + 0.06 * wide, high), fill=tint(colour, 0.7))
        return
    top = high * between(rng, (0.6, 0.85))
    if kind == 1:  # bush
        for _ in range(12):
            cx = x + wide * between(rng, (-0.4, 0.4))
            cy = top + high * between(rng, (0.05, 0.3))
            disc(canvas, cx, cy, 0.16 * wide, 0.16 * wide, near(rng, (50, 85, 45), 18))
    else:  # low wall or car, from one side
        left = x < 0.5 * wide
        start, end = (-9.0, x + 0.2 * wide) if left else (x - 0.2 * wide, wide + 9.0)
        canvas.rounded_rectangle((start, top, end, high), 0.06 * wide, fill=colour)
        canvas.line((start, top + 0.05 * high, end, top + 0.05 * high), tint(colour, 0.6), 5)


def _draw_wall(
    canvas: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    wall: Colour,
    step: int,
    wide: int,
    horizon: int,
) -> None:
    kind = int(rng.integers(4))
    for x in range(0, wide, step):
        if kind == 0:  # bricks or panels
            canvas.line((x, 0, x, horizon), fill=tint(wall, 0.75), width=3)
            canvas.line((0, x, wide, x), fill=tint(wall, 0.8), width=3)
        elif kind == 1:  # windows
            for y in range(step // 3, horizon, step):
                canvas.rectangle((x, y, x + step // 2, y + step // 2), fill=tint(wall, 0.45))
        elif kind == 2:  # hedge
            for _ in range(6):
                cx, cy = x + int(rng.integers(step)), int(rng.integers(horizon))
                disc(canvas, cx, cy, step, step // 2, near(rng, (60, 95, 50), 30))
        else:  # pillars
            canvas.rectangle((x, 0, x + step // 3, horizon), fill=tint(wall, 1.25))


def _draw_ground(
    canvas: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    ground: Colour,
    step: int,
    size: tuple[int, int],
    horizon: int,
) -> None:
    wide, high = size
    kind, slant = int(rng.integers(3)), int(rng.integers(-high, high))
    for k in range(-16, 2 * wide // step + 16):
        if kind == 0:  # lines that lead away
            line = (k * step, horizon, k * step + slant, high)
            canvas.line(line, fill=tint(ground, 0.8), width=3)
        elif kind == 1 and k >= 0:  # lines across
            y = horizon + k * step // 2
            canvas.line((0, y, wide, y), fill=tint(ground, 1.2), width=4)


def _draw_thing(
    canvas: ImageDraw.ImageDraw, rng: np.random.Generator, size: tuple[int, int], horizon: int
) -> None:
    """Draws a lamp post, a car, a door or a bush somewhere on the ground."""
    wide, high = size
    x, foot = int(rng.integers(wide)), horizon + int(rng.integers(-high // 20, high // 4))
    colour, unit = near(rng, pick(rng, CLOTHES), 25), between(rng, (0.08, 0.25)) * high
    kind = int(rng.integers(4))
    if kind == 0:  # lamp post
        canvas.rectangle((x, foot - 4 * unit, x + 0.15 * unit, foot), fill=tint(colour, 0.7))
    elif kind == 1:  # car
        canvas.rounded_rectangle((x, foot - unit, x + 2.2 * unit, foot), 0.3 * unit, colour)
        glass = (x + 0.4 * unit, foot - 0.85 * unit, x + 1.8 * unit, foot - 0.5 * unit)
        canvas.rectangle(glass, fill=(70, 80, 95))
        for wheel in (0.5, 1.7):
            hub = x + wheel * unit
            disc(canvas, hub, foot, 0.25 * unit, 0.25 * unit, (25, 25, 25))
    elif kind == 2:  # door, sign or bin
        canvas.rectangle((x, foot - 1.6 * unit, x + unit, foot), fill=colour)
        panel = (x + 0.2 * unit, foot - 1.4 * unit, x + 0.8 * unit, foot - unit)
        canvas.rectangle(panel, fill=tint(colour, 1.4))
    else:  # bush
        for _ in range(8):
            across, up = x + unit * float(rng.random()), 0.6 * unit * float(rng.random())
            leaf = near(rng, (55, 90, 45), 25)
            disc(canvas, across, foot - up, 0.4 * unit, 0.4 * unit, leaf)
