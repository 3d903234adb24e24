"""Pedestrians drawn by the project: a re-identification set without a download.

`draw_persons` writes JPEG files in the folder layout of Market-1501. A person is a set of clothes,
a bag, hair and a build on a small walking body; a camera is a scene behind the person, a usual
walking direction, and an image chain (colour cast, exposure, gamma, haze, blur, noise). Many
persons share a few colours and cameras change these strongly, so that neither raw pixels nor
colour histograms find a person again, while clothes, patterns and bags survive in the picture.
`CameraStyle` holds the constants that set the difficulty.

Everything comes from generators seeded by (seed, kind, index...), so that the same arguments give
the same files in whatever order and in however many processes they are drawn. The pixels of a JPEG
file also depend on the JPEG library that Pillow was built with.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from reid.files import read_text

Colour = tuple[int, int, int]
Range = tuple[float, float]
Point = tuple[float, float]
T = TypeVar("T")

# First number of a seed after the user's: one stream of random numbers for each kind of thing.
_PERSON, _CAMERA, _VISITS, _IMAGE, _DISTRACTOR, _JUNK = range(6)
_SUPERSAMPLE = 3
_PANORAMA = 6  # width of a camera's scene, in widths of an image

_SKIN = ((245, 214, 190), (230, 190, 160), (205, 155, 120), (165, 115, 80), (120, 80, 55))
_HAIR = ((25, 20, 20), (60, 40, 30), (110, 75, 45), (190, 155, 95), (140, 60, 35), (150, 150, 150))
# Clothes: dark and neutral colours come twice, as in a street, so that many persons share them.
_CLOTHES = (
    *((28, 28, 32), (120, 122, 126), (232, 232, 228), (34, 44, 88)) * 2,
    *((62, 92, 150), (178, 40, 44), (46, 112, 70), (226, 190, 60), (126, 72, 46), (196, 176, 140)),
    *((214, 116, 48), (112, 60, 128), (222, 140, 168), (110, 180, 204)),
)
_WALLS = ((150, 140, 130), (120, 125, 135), (170, 120, 95), (95, 110, 90), (200, 195, 185))
_GROUNDS = ((110, 110, 112), (150, 140, 125), (90, 110, 75), (70, 72, 78), (165, 165, 160))


@dataclass(frozen=True)
class CameraStyle:
    """The difficulty of a set: ranges from which cameras and images are drawn.

    Pairs are (low, high) of uniform draws. The first group is drawn once for each camera, the
    second for each image.

    Attributes:
        cast: Gain of one colour channel, as a power of two.
        exposure: Gain of all channels, as a power of two.
        gamma: Exponent on intensities in [0, 1].
        saturation: 0 is grey, 1 is unchanged.
        haze: Share of the picture that is replaced by the camera's grey.
        blur: Standard deviation in pixels of an image 128 high.
        noise: Standard deviation in grey levels of 255.
        resolution: Share of the pixels in each direction that the sensor has.
        pitch: Looking down: 0 is level; 0.5 shortens the legs clearly.
        light: Light from the left (-1) or the right (1).
        turn: Spread of walking directions around the camera's path, in radians.
        flicker: Change of exposure between images, as a power of two.
        shift: Error of the box's centre, in heights of a person.
        zoom: Error of the box's scale, in powers of two.
        pole: Probability of an obstacle in front of the person.
        crowd: Probability of another person beside, in front or behind.
        shade: Probability that a shadow falls over a part of the picture.
    """

    cast: Range = (-0.45, 0.45)
    exposure: Range = (-0.8, 0.5)
    gamma: Range = (0.7, 1.5)
    saturation: Range = (0.45, 1.15)
    haze: Range = (0.0, 0.3)
    blur: Range = (0.2, 1.2)
    noise: Range = (2.0, 10.0)
    resolution: Range = (0.5, 1.0)
    pitch: Range = (0.0, 0.4)
    light: Range = (-1.0, 1.0)

    turn: float = 0.5
    flicker: float = 0.25
    shift: float = 0.06
    zoom: float = 0.2
    pole: float = 0.25
    crowd: float = 0.25
    shade: float = 0.3


@dataclass(frozen=True)
class Person:
    """What stays the same of one person in all pictures; lengths are in heights of a body.

    Attributes:
        build: Width of the body; 1 is average.
        legs: Height of the hips above the ground.
        head: Radius of the head.
        stride: Length of a step; 1 is average.
        skin: Colour of face, hands and bare legs.
        hair: `short`, `long`, `bun` or `bald`.
        hair_colour: Colour of the hair.
        hat: `none`, `cap`, `beanie` or `brim`.
        hat_colour: Colour of the hat.
        upper: `long` or `short` sleeves, `coat` or `dress`.
        pattern: `plain`, `hoops`, `pinstripes`, `checks`, `logo`, `yoke`, `open` or `sash`.
        period: Distance between stripes, or size of the logo.
        colours: Main and second colour of the upper clothes.
        lower: `trousers`, `shorts` or `skirt`; not seen under a long dress.
        lower_colour: Colour of the lower clothes.
        piping: A stripe of the second colour along the trousers.
        bag: `none`, `backpack`, `shoulder` or `handbag`.
        bag_colour: Colour of the bag.
        side: The side of the bag: 1 is the person's left, -1 the right.
        shoes: Colour of the shoes.
    """

    build: float
    legs: float
    head: float
    stride: float
    skin: Colour
    hair: str
    hair_colour: Colour
    hat: str
    hat_colour: Colour
    upper: str
    pattern: str
    period: float
    colours: tuple[Colour, Colour]
    lower: str
    lower_colour: Colour
    piping: bool
    bag: str
    bag_colour: Colour
    side: int
    shoes: Colour


@dataclass(frozen=True)
class Camera:
    """What stays the same in all pictures of one camera; see `CameraStyle` for the units.

    Attributes:
        scene: Seed of the scene behind the persons.
        path: Usual walking direction in radians; 0 is towards the camera. People also come back.
        gains: Gains of red, green and blue.
        gamma: Exponent on intensities.
        saturation: 0 is grey, 1 is unchanged.
        haze: Share of grey in the picture.
        haze_level: The grey, in [0, 255].
        blur: Standard deviation in pixels of an image 128 high.
        noise: Standard deviation in grey levels.
        resolution: Share of the pixels in each direction.
        pitch: Looking down.
        light: From the left (-1) or the right (1).
        style: Ranges of what changes between images.
    """

    scene: int
    path: float
    gains: tuple[float, float, float]
    gamma: float
    saturation: float
    haze: float
    haze_level: float
    blur: float
    noise: float
    resolution: float
    pitch: float
    light: float
    style: CameraStyle = field(default_factory=CameraStyle)


def _between(rng: np.random.Generator, bounds: Range) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(rng.random())


def _pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def _near(rng: np.random.Generator, colour: Colour, spread: int = 10) -> Colour:
    red, green, blue = (int(rng.integers(-spread, spread + 1)) + part for part in colour)
    return _tint((red, green, blue), 1.0)


def _tint(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(max(int(part * factor), 0), 255) for part in colour)
    return red, green, blue


def _disc(
    draw: ImageDraw.ImageDraw, x: float, y: float, wide: float, high: float, fill: Colour | int
) -> None:
    draw.ellipse((x - wide, y - high, x + wide, y + high), fill=fill)


def sample_person(rng: np.random.Generator) -> Person:
    """Draws the looks of one person."""
    clothes = [_near(rng, _pick(rng, _CLOTHES)) for _ in range(6)]
    if max(abs(a - b) for a, b in zip(clothes[0], clothes[1], strict=True)) < 60:
        # A pattern in two equal colours could not be seen.
        clothes[1] = _tint((255, 255, 255), 0.92) if sum(clothes[0]) < 380 else (30, 30, 36)
    return Person(
        build=_between(rng, (0.78, 1.3)),
        legs=_between(rng, (0.46, 0.53)),
        head=_between(rng, (0.055, 0.068)),
        stride=_between(rng, (0.6, 1.2)),
        skin=_near(rng, _pick(rng, _SKIN), 6),
        hair=_pick(rng, ("short", "short", "short", "long", "long", "bun", "bun", "bald")),
        hair_colour=_near(rng, _pick(rng, _HAIR), 6),
        hat=_pick(rng, ("none",) * 7 + ("cap", "beanie", "brim")),
        hat_colour=clothes[2],
        upper=_pick(rng, ("long", "long", "long", "short", "short", "coat", "dress")),
        pattern=_pick(
            rng, ("plain",) * 3 + ("hoops", "pinstripes", "checks", "logo", "yoke", "open", "sash")
        ),
        period=_between(rng, (0.04, 0.085)),
        colours=(clothes[0], clothes[1]),
        lower=_pick(rng, ("trousers",) * 5 + ("shorts", "shorts", "skirt", "skirt")),
        lower_colour=clothes[3],
        piping=bool(rng.random() < 0.15),
        bag=_pick(rng, ("none", "none", "backpack", "backpack", "shoulder", "handbag")),
        bag_colour=clothes[4],
        side=1 if rng.random() < 0.5 else -1,
        shoes=clothes[5],
    )


def sample_camera(rng: np.random.Generator, style: CameraStyle | None = None) -> Camera:
    """Draws one camera; `style` sets the ranges (left out: the constants of `CameraStyle`)."""
    style = style or CameraStyle()
    exposure = _between(rng, style.exposure)
    red, green, blue = (2.0 ** (exposure + _between(rng, style.cast)) for _ in range(3))
    return Camera(
        scene=int(rng.integers(2**31)),
        path=_between(rng, (0.0, math.pi)),
        gains=(red, green, blue),
        gamma=_between(rng, style.gamma),
        saturation=_between(rng, style.saturation),
        haze=_between(rng, style.haze),
        haze_level=_between(rng, (90.0, 220.0)),
        blur=_between(rng, style.blur),
        noise=_between(rng, style.noise),
        resolution=_between(rng, style.resolution),
        pitch=_between(rng, style.pitch),
        light=_between(rng, style.light),
        style=style,
    )


class _Figure:
    """One walking body on a transparent layer.

    The body has three axes, in heights of a body: to its left, forward, and down from the top of
    the head; `at` maps them to pixels of the layer.
    """

    def __init__(
        self,
        layer: Image.Image,
        person: Person,
        pitch: float,
        yaw: float,
        phase: float,
        origin: Point,
        scale: float,
    ) -> None:
        self.layer, self.person, self.pitch = layer, person, pitch
        self.draw = ImageDraw.Draw(layer)
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.phase, self.origin, self.scale = phase, origin, scale
        self.hip = 1.0 - person.legs

    def at(self, left: float, forward: float, down: float) -> Point:
        across = (left * self.cos + forward * self.sin) * (1.0 + self.pitch * (0.5 - down))
        down += self.pitch * down * (1.0 - down)
        return self.origin[0] + across * self.scale, self.origin[1] + down * self.scale

    def half(self, wide: float, deep: float) -> float:
        """Half the width in the picture of an ellipse with these two half axes."""
        return math.hypot(wide * self.cos, deep * self.sin) * self.person.build

    def bar(
        self,
        ends: Sequence[Point],
        widths: Sequence[float],
        colour: Colour | int,
        draw: ImageDraw.ImageDraw | None = None,
    ) -> None:
        """A bent limb: a disc at each joint and straight sides between them."""
        draw = draw or self.draw
        radii = [width * self.scale * 0.5 for width in widths]
        for (x, y), r in zip(ends, radii, strict=True):
            _disc(draw, x, y, r, r, colour)
        joints = zip(ends, radii, strict=True)
        for (a, r), (b, s) in itertools.pairwise(joints):
            length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
            u, v = (b[1] - a[1]) / length, (a[0] - b[0]) / length
            corners = ((a, r), (b, s), (b, -s), (a, -r))
            draw.polygon([(p[0] + u * q, p[1] + v * q) for p, q in corners], fill=colour)

    def band(
        self,
        rows: Sequence[tuple[float, float]],
        colour: Colour | int,
        draw: ImageDraw.ImageDraw | None = None,
        forward: float = 0.0,
    ) -> None:
        """A shape around the body's axis; `rows` are (down, half the width) from above."""
        sides: list[list[Point]] = [[], []]
        for down, half in rows:
            x, y = self.at(0.0, forward, down)
            sides[0].append((x - half * self.scale, y))
            sides[1].append((x + half * self.scale, y))
        (draw or self.draw).polygon(sides[0] + sides[1][::-1], fill=colour)

    def cloth(self, factor: float) -> Image.Image:
        """The upper clothes' pattern, as large as the layer."""
        person = self.person
        main, second = (_tint(colour, factor) for colour in person.colours)
        cloth = Image.new("RGB", self.layer.size, main)
        draw = ImageDraw.Draw(cloth)
        step = person.period * self.scale
        x, y = self.at(0.0, 0.0, 0.17)
        far = self.layer.size[0] + self.layer.size[1]
        if person.pattern in ("hoops", "checks"):
            for k in range(16):
                draw.rectangle((0, y + k * step, far, y + (k + 0.45) * step), fill=second)
        if person.pattern in ("pinstripes", "checks"):
            across = step * (0.45 + 0.55 * abs(self.cos))
            line = main if person.pattern == "checks" else second
            for k in range(-8, 9):
                draw.rectangle((x + k * across, 0, x + (k + 0.4) * across, far), fill=line)
        if person.pattern == "yoke":
            draw.rectangle((0, y, far, y + (0.05 + 1.2 * person.period) * self.scale), fill=second)
        return cloth

    def clothe(self, mask: Image.Image, factor: float = 1.0) -> None:
        self.layer.paste(self.cloth(factor), mask=mask)

    def mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        mask = Image.new("L", self.layer.size)
        return mask, ImageDraw.Draw(mask)

    def leg(self, side: int) -> None:
        person, build = self.person, self.person.build
        swing = side * math.sin(self.phase) * person.stride
        lift = max(0.0, side * math.cos(self.phase)) * 0.03 * person.stride
        knee_down = self.hip + 0.46 * person.legs
        hip = self.at(side * 0.048 * build, 0.0, self.hip)
        knee = self.at(side * 0.05, 0.06 * swing + lift, knee_down)
        ankle = self.at(side * 0.045, 0.13 * swing - lift, 0.955 - lift)
        toe = self.at(side * 0.05, 0.13 * swing - lift + 0.055, 0.975 - lift)
        factor = 1.0 if side * self.sin <= 0 else 0.82
        skin, cloth = _tint(person.skin, factor), _tint(person.lower_colour, factor)
        trousers = person.lower == "trousers" and person.upper != "dress"
        widths = (0.105 * build, 0.078 * build, 0.055 * build)
        self.bar((hip, knee, ankle), widths, cloth if trousers else skin)
        if person.lower == "shorts" and person.upper != "dress":
            low = self.at(side * 0.05, 0.055 * swing + lift, knee_down - 0.01)
            self.bar((hip, low), (0.112 * build, 0.1 * build), cloth)
        elif trousers and person.piping:
            self.bar((hip, knee, ankle), (0.02, 0.02, 0.02), _tint(person.colours[1], factor))
        self.bar((ankle, toe), (0.055, 0.04), _tint(person.shoes, factor))

    def arm(self, side: int) -> None:
        person, build = self.person, self.person.build
        swing = -side * math.sin(self.phase) * person.stride
        shoulder = self.at(side * 0.105 * build, 0.0, 0.205)
        elbow = self.at(side * (0.115 * build + 0.02), 0.045 * swing - 0.01, 0.345)
        hand = self.at(side * (0.11 * build + 0.025), 0.11 * swing + 0.03, 0.475)
        factor = 0.86 if side * self.sin <= 0 else 0.7
        self.bar((elbow, hand), (0.05, 0.04), _tint(person.skin, factor + 0.1))
        mask, draw = self.mask()
        if person.upper in ("long", "coat"):
            wrist = (elbow[0] + 0.82 * (hand[0] - elbow[0]), elbow[1] + 0.82 * (hand[1] - elbow[1]))
            ends, widths = (shoulder, elbow, wrist), (0.075 * build, 0.062 * build, 0.05 * build)
            self.bar(ends, widths, 255, draw)
        else:
            middle = (0.3 * shoulder[0] + 0.7 * elbow[0], 0.3 * shoulder[1] + 0.7 * elbow[1])
            self.bar((shoulder, middle), (0.078 * build, 0.07 * build), 255, draw)
            self.bar((middle, elbow), (0.05, 0.05), _tint(person.skin, factor + 0.1))
        self.clothe(mask, factor)
        if person.bag == "handbag" and side == person.side:
            x, y = hand
            wide, high = 0.06 * (0.5 + 0.5 * abs(self.sin)) * self.scale, 0.1 * self.scale
            self.draw.line((x, y, x - wide, y + 0.4 * high), fill=(30, 30, 30), width=3)
            self.draw.line((x, y, x + wide, y + 0.4 * high), fill=(30, 30, 30), width=3)
            box = (x - wide, y + 0.4 * high, x + wide, y + 1.4 * high)
            self.draw.rectangle(box, fill=person.bag_colour)

    def torso(self) -> None:
        person = self.person
        skirt = person.lower == "skirt" and person.upper != "dress"
        waist = self.hip - 0.055, self.half(0.088, 0.068)
        low = self.hip + (0.2 if skirt else 0.035)
        end = low, self.half(0.135, 0.12) if skirt else self.half(0.098, 0.075)
        self.band((waist, end), person.lower_colour)
        hem = {"coat": self.hip + 0.14, "dress": self.hip + 0.2}.get(person.upper, self.hip + 0.01)
        flare = {"coat": 1.12, "dress": 1.4}.get(person.upper, 1.0)
        mask, draw = self.mask()
        shape = [(0.158, 0.035, 0.035), (0.178, 0.09, 0.05), (0.2, 0.118, 0.066)]
        shape += [(0.36, 0.095, 0.07), (hem, 0.1 * flare, 0.074 * flare)]
        self.band([(down, self.half(wide, deep)) for down, wide, deep in shape], 255, draw)
        self.clothe(mask)
        front = self.cos > 0.25
        if front and person.pattern == "logo":
            x, y = self.at(0.0, 0.065, 0.29)
            wide, high = person.period * self.cos * self.scale, 0.8 * person.period * self.scale
            _disc(self.draw, x, y, wide, high, person.colours[1])
        elif front and person.pattern == "open":
            ends = (self.at(0.0, 0.065, 0.175), self.at(0.0, 0.065, hem - 0.01))
            self.bar(ends, (0.04, 0.7 * person.period + 0.02), person.colours[1])
        elif person.pattern == "sash":
            sign = 1.0 if self.cos > 0 else -1.0
            ends = (
                self.at(0.08 * person.build, 0.05 * sign, 0.21),
                self.at(-0.08 * person.build, 0.05 * sign, self.hip - 0.02),
            )
            self.bar(ends, (0.05, 0.05), person.colours[1])

    def bag(self, over: bool) -> None:
        """The bag's part that is drawn before (`over` false) or after the torso."""
        person, dark = self.person, _tint(self.person.bag_colour, 0.7)
        if person.bag == "backpack":
            if over != (self.cos > 0.0):
                half = math.hypot(0.082 * self.cos, 0.05 * self.sin)
                rows = ((0.19, 0.6 * half), (0.215, half), (0.42, half * 1.08), (0.44, half * 0.8))
                self.band(rows, person.bag_colour, forward=-0.095)
                self.band(((0.34, half * 0.8), (0.35, half * 0.8)), dark, forward=-0.1)
            elif over:
                for side in (-1, 1):
                    ends = (self.at(side * 0.06, 0.04, 0.18), self.at(side * 0.07, 0.05, 0.36))
                    self.bar(ends, (0.022, 0.022), person.bag_colour)
        elif person.bag == "shoulder":
            near = person.side * self.sin < 0.35
            if over:
                sign = 0.06 if self.cos > 0 else -0.06
                ends = (
                    self.at(-person.side * 0.07, sign, 0.18),
                    self.at(person.side * 0.1, sign, self.hip - 0.04),
                )
                self.bar(ends, (0.016, 0.016), dark)
            if over == near:
                half = 0.055 * (0.6 + 0.4 * abs(self.sin))
                x, y = self.at(person.side * 0.13 * person.build, 0.0, self.hip - 0.06)
                half, high = half * self.scale, 0.12 * self.scale
                self.draw.rounded_rectangle((x - half, y, x + half, y + high), 4, person.bag_colour)
                self.draw.rectangle((x - half, y, x + half, y + 0.35 * high), fill=dark)

    def head(self) -> None:
        person, r = self.person, self.person.head
        hair, scale = person.hair_colour, self.scale
        self.bar(
            (self.at(0, 0, 0.13), self.at(0, 0, 0.175)), (0.05, 0.055), _tint(person.skin, 0.8)
        )
        x, y = self.at(0.0, 0.012, 0.012 + 1.15 * r)
        wide, high = r * 0.86 * scale, r * 1.12 * scale
        _disc(self.draw, x, y, wide, high, person.skin)
        face, bald = self.sin * wide * 0.55, person.hair == "bald"
        if not bald:
            # The hair is the head's outline, cut open where the face looks.
            box = (x - 1.06 * wide, y - 1.08 * high, x + 1.06 * wide, y + 1.02 * high)
            turn = 90.0 * (1.0 - self.cos)  # 0: from the front, 180: from the back
            if self.cos < -0.4:
                self.draw.ellipse(box, fill=hair)
            else:
                back = min(turn, 95.0)
                start = 195.0 - back if self.sin > 0 else 195.0 + 0.4 * back
                end = 345.0 - 0.4 * back if self.sin > 0 else 345.0 + back
                self.draw.chord(box, start, end, fill=hair)
        if person.hair == "long" and self.cos <= 0:
            self.band(((0.04, 0.8 * r), (0.1, 1.05 * r), (0.24, 0.95 * r)), hair, forward=-0.02)
        if person.hair == "bun":
            bx, by = self.at(0.0, -0.05, 0.03)
            _disc(self.draw, bx, by, 0.5 * wide, 0.5 * wide, hair)
        if self.cos > 0.1:
            for side in (-1, 1):
                ex, ey = x + face + side * 0.36 * wide * self.cos, y + 0.05 * high
                _disc(self.draw, ex, ey, 0.11 * wide, 0.11 * wide, (30, 25, 25))
        if person.hat != "none":
            top = (x - 1.12 * wide, y - 1.2 * high, x + 1.12 * wide, y + 0.5 * high)
            self.draw.chord(top, 180, 360, fill=person.hat_colour)
            if person.hat == "cap":
                ends = ((x, y - 0.4 * high), (x + 1.6 * wide * self.sin, y - 0.35 * high))
                if self.cos > -0.5:
                    self.bar(ends, (0.03, 0.02), _tint(person.hat_colour, 0.8))
            elif person.hat == "brim":
                ends = ((x - 1.5 * wide, y - 0.4 * high), (x + 1.5 * wide, y - 0.4 * high))
                self.bar(ends, (0.02, 0.02), _tint(person.hat_colour, 0.8))

    def render(self, light: float) -> None:
        """Draws the body from back to front, then its shadow side."""
        x, y = self.at(0.0, 0.0, 0.975)
        wide = 0.16 * self.scale
        shadow = (x - wide, y - 0.1 * wide, x + wide * (1.0 - light), y + 0.22 * wide)
        ground = Image.new("RGBA", self.layer.size)
        ImageDraw.Draw(ground).ellipse(shadow, fill=(20, 20, 24, 110))
        far, near = (1, -1) if self.sin > 0 else (-1, 1)
        self.leg(far)
        if abs(self.sin) > 0.3:
            self.arm(far)
        self.leg(near)
        self.bag(over=False)
        if self.person.hair == "long" and self.cos > 0:
            r = self.person.head
            rows = ((0.05, 1.0 * r), (0.2, 1.1 * r), (0.25, 0.9 * r))
            self.band(rows, self.person.hair_colour, forward=-0.02)
        self.torso()
        self.head()
        self.bag(over=True)
        if abs(self.sin) <= 0.3:
            self.arm(far)
        self.arm(near)
        columns = (np.arange(self.layer.size[0]) - x) / (0.14 * self.scale)
        ramp = np.clip(1.0 + 0.22 * light * columns - 0.1 * columns**2, 0.45, 1.0) * 255.0
        shade = np.repeat(ramp.astype(np.uint8)[None, :, None], 4, axis=2)
        shade[:, :, 3] = 255
        body = ImageChops.multiply(
            self.layer, Image.fromarray(shade).resize(self.layer.size, Image.Resampling.NEAREST)
        )
        ground.alpha_composite(body)
        self.layer.paste(ground)


@functools.lru_cache(maxsize=64)
def _panorama(seed: int, height: int, width: int) -> Image.Image:
    """The scene of a camera, `_PANORAMA` images wide and a quarter higher than an image."""
    rng = np.random.Generator(np.random.PCG64(seed))
    wide, high = 2 * _PANORAMA * width, int(2.5 * height)
    horizon = int(_between(rng, (0.3, 0.65)) * high)
    wall, ground = _near(rng, _pick(rng, _WALLS), 40), _near(rng, _pick(rng, _GROUNDS), 30)
    scene = Image.new("RGB", (wide, high), wall)
    draw = ImageDraw.Draw(scene)
    step, kind = int(_between(rng, (0.06, 0.25)) * high), int(rng.integers(4))
    for x in range(0, wide, step):
        if kind == 0:  # bricks or panels
            draw.line((x, 0, x, horizon), fill=_tint(wall, 0.75), width=3)
            draw.line((0, x, wide, x), fill=_tint(wall, 0.8), width=3)
        elif kind == 1:  # windows
            for y in range(step // 3, horizon, step):
                draw.rectangle((x, y, x + step // 2, y + step // 2), fill=_tint(wall, 0.45))
        elif kind == 2:  # hedge
            for _ in range(6):
                cx, cy = x + int(rng.integers(step)), int(rng.integers(horizon))
                _disc(draw, cx, cy, step, step // 2, _near(rng, (60, 95, 50), 30))
        else:  # pillars
            draw.rectangle((x, 0, x + step // 3, horizon), fill=_tint(wall, 1.25))
    draw.rectangle((0, horizon, wide, high), fill=ground)
    lines, slant = int(rng.integers(3)), int(rng.integers(-high, high))
    for k in range(-16, 2 * wide // step + 16):
        if lines == 0:
            draw.line((k * step, horizon, k * step + slant, high), fill=_tint(ground, 0.8), width=3)
        elif lines == 1 and k >= 0:
            y = horizon + k * step // 2
            draw.line((0, y, wide, y), fill=_tint(ground, 1.2), width=4)
    for _ in range(int(rng.integers(8, 20))):
        x, foot = int(rng.integers(wide)), horizon + int(rng.integers(-high // 20, high // 4))
        colour, size = _near(rng, _pick(rng, _CLOTHES), 25), _between(rng, (0.08, 0.25)) * high
        thing = int(rng.integers(4))
        if thing == 0:  # lamp post
            draw.rectangle((x, foot - 4 * size, x + 0.15 * size, foot), fill=_tint(colour, 0.7))
        elif thing == 1:  # car
            draw.rounded_rectangle((x, foot - size, x + 2.2 * size, foot), 0.3 * size, colour)
            glass = (x + 0.4 * size, foot - 0.85 * size, x + 1.8 * size, foot - 0.5 * size)
            draw.rectangle(glass, fill=(70, 80, 95))
            for wheel in (0.5, 1.7):
                hub = x + wheel * size
                _disc(draw, hub, foot, 0.25 * size, 0.25 * size, (25, 25, 25))
        elif thing == 2:  # door, sign or bin
            draw.rectangle((x, foot - 1.6 * size, x + size, foot), fill=colour)
            panel = (x + 0.2 * size, foot - 1.4 * size, x + 0.8 * size, foot - size)
            draw.rectangle(panel, fill=_tint(colour, 1.4))
        else:  # bush
            for _ in range(8):
                across, up = x + size * float(rng.random()), 0.6 * size * float(rng.random())
                leaf = _near(rng, (55, 90, 45), 25)
                _disc(draw, across, foot - up, 0.4 * size, 0.4 * size, leaf)
    # Paler than clothes, as most streets are.
    grey = scene.convert("L").convert("RGB")
    return Image.blend(grey, scene, _between(rng, (0.4, 0.8))).reduce(2)


def _obstacle(layer: Image.Image, camera: Camera, rng: np.random.Generator) -> None:
    """Something of the scene that stands in front of the person."""
    wide, high = layer.size
    own = np.random.Generator(np.random.PCG64((camera.scene, 1)))
    kind, colour = int(own.integers(3)), _near(own, _pick(own, _CLOTHES), 25)
    draw = ImageDraw.Draw(layer)
    x = float(rng.random()) * wide
    if kind == 0:  # pole
        draw.rectangle((x - 0.06 * wide, 0, x + 0.06 * wide, high), fill=colour)
        draw.rectangle((x + 0.02 * wide, 0, x + 0.06 * wide, high), fill=_tint(colour, 0.7))
        return
    top = high * _between(rng, (0.6, 0.85))
    if kind == 1:  # bush
        for _ in range(12):
            cx = x + wide * _between(rng, (-0.4, 0.4))
            cy = top + high * _between(rng, (0.05, 0.3))
            _disc(draw, cx, cy, 0.16 * wide, 0.16 * wide, _near(rng, (50, 85, 45), 18))
    else:  # low wall or car, from one side
        left = x < 0.5 * wide
        start, end = (-9.0, x + 0.2 * wide) if left else (x - 0.2 * wide, wide + 9.0)
        box = (start, top, end, high)
        draw.rounded_rectangle(box, 0.06 * wide, fill=colour)
        draw.line((box[0], top + 0.05 * high, box[2], top + 0.05 * high), _tint(colour, 0.6), 5)


def _develop(image: Image.Image, camera: Camera, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The camera's image chain: light and colours, haze, optics, sensor."""
    width, height = image.size
    flicker = 2.0 ** _between(rng, (-camera.style.flicker, camera.style.flicker))
    grey, own = (1.0 - camera.saturation), camera.saturation
    luma = (0.299 * grey, 0.587 * grey, 0.114 * grey)
    matrix: list[float] = []
    for channel, gain in enumerate(camera.gains):
        row = [(part + own * (k == channel)) * gain * flicker for k, part in enumerate(luma)]
        matrix += [*row, 0.0]
    image = image.convert("RGB", tuple(matrix))
    table = [
        round(
            (1.0 - camera.haze) * 255.0 * (level / 255.0) ** camera.gamma
            + camera.haze * camera.haze_level
        )
        for level in range(256)
    ]
    image = image.point(table * 3)
    small = (max(1, round(width * camera.resolution)), max(1, round(height * camera.resolution)))
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 128.0))
    image = image.resize(small, Image.Resampling.BILINEAR).resize((width, height))
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * camera.noise
    pixels = np.asarray(image, dtype=np.float32) + noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _expose(
    person: Person | None,
    camera: Camera,
    rng: np.random.Generator,
    height: int,
    width: int,
    error: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """One picture; nobody if `person` is None. `error` multiplies the errors of the box."""
    style = camera.style
    panorama = _panorama(camera.scene, height, width)
    x = int(rng.integers(panorama.size[0] - width + 1))
    y = int(rng.integers(panorama.size[1] - height + 1))
    picture = panorama.crop((x, y, x + width, y + height))
    wide, high = width * _SUPERSAMPLE, height * _SUPERSAMPLE

    def stand(who: Person, aside: float, scale: float, top: float, yaw: float) -> None:
        layer = Image.new("RGBA", (wide, high))
        origin = (wide * 0.5 + aside * scale, top)
        phase = _between(rng, (0.0, 2.0 * math.pi))
        _Figure(layer, who, camera.pitch, yaw, phase, origin, scale).render(camera.light)
        small = layer.reduce(_SUPERSAMPLE)
        picture.paste(small, mask=small)

    def yaw() -> float:
        back = math.pi * int(rng.integers(2))
        return camera.path + back + _between(rng, (-style.turn, style.turn))

    scale = 0.92 * high * 2.0 ** (error * _between(rng, (-style.zoom, 0.5 * style.zoom)))
    aside = error * _between(rng, (-style.shift, style.shift))
    top = 0.5 * (high - scale) + error * _between(rng, (-style.shift, style.shift)) * scale
    crowd = rng.random() < style.crowd
    in_front = rng.random() < 0.35
    side = 1.0 if rng.random() < 0.5 else -1.0
    distance = side * _between(rng, (0.15, 0.32))
    other = sample_person(rng)

    if crowd and not in_front:
        stand(other, distance, 0.94 * scale, top, yaw())
    if person is not None:
        stand(person, aside, scale, top, yaw())
    if crowd and in_front:
        stand(other, distance + 0.08 * side, 1.04 * scale, top, yaw())
    if rng.random() < style.pole:
        layer = Image.new("RGBA", (wide, high))
        _obstacle(layer, camera, rng)
        small = layer.reduce(_SUPERSAMPLE)
        picture.paste(small, mask=small)
    if rng.random() < style.shade:
        cut, slope = _between(rng, (0.1, 0.9)), _between(rng, (-0.5, 0.5))
        mask = Image.new("L", (width, height), 255)
        ends = ((width * (cut - slope), 0), (width * (cut + slope), height))
        corner = width * 3 if rng.random() < 0.5 else -width * 3
        level = int(_between(rng, (110.0, 190.0)))
        ImageDraw.Draw(mask).polygon((*ends, (corner, height), (corner, 0)), fill=level)
        picture = ImageChops.multiply(picture, mask.convert("RGB"))
    return _develop(picture, camera, rng)


def draw_image(
    person: Person, camera: Camera, rng: np.random.Generator, height: int, width: int
) -> npt.NDArray[np.uint8]:
    """Draws one picture of `person` as `camera` sees it.

    Args:
        person: Who is in the picture.
        camera: Through which camera.
        rng: What differs from picture to picture: pose, direction, box, obstacles, noise.
        height: Pixels, at least 16.
        width: Pixels, at least 8.

    Returns:
        RGB pixels (height, width, 3) in [0, 255].

    Raises:
        ValueError: The picture would be too small.
    """
    _at_least("height", height, 16)
    _at_least("width", width, 8)
    return _expose(person, camera, rng, height, width)


_LEAST = {
    "seed": 0,
    "num_train": 1,
    "num_test": 1,
    "num_cameras": 2,
    "images_per_camera": 1,
    "num_distractors": 0,
    "height": 16,
    "width": 8,
    "quality": 1,
    "persons_from": 0,
}


def check_range(**sizes: int) -> None:
    """Checks arguments of `draw_persons`.

    Raises:
        ValueError: One is too small, or no integer.
    """
    for name, value in sizes.items():
        _at_least(name, value, _LEAST[name])


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _stream(seed: int, kind: int, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64((seed, kind, *index)))


def draw_persons(
    root: Path,
    *,
    seed: int,
    num_train: int,
    num_test: int,
    num_cameras: int,
    images_per_camera: int,
    num_distractors: int,
    height: int = 128,
    width: int = 64,
    quality: int = 90,
    persons_from: int = 0,
) -> None:
    """Draws a set of persons as JPEG files in the layout of Market-1501.

    Writes `bounding_box_train`, `query` and `bounding_box_test` with names
    `{pid:04d}_c{camera}s1_{frame:06d}_00.jpg`, and a `README.txt`. Identities 1 to `num_train` are
    for training, the next `num_test` for testing. Each is seen by a random 2 to `num_cameras`
    cameras. The first picture of a test identity in each of its cameras is a query, the others
    (at least one for each camera) are in the gallery. The gallery also holds `num_distractors`
    pictures of nobody in particular (identity 0000) and a tenth as many badly boxed pictures of
    test identities (junk, identity -1).

    The folder appears under its name only when it is complete.

    Args:
        root: Folder to create; may exist if it is empty.
        seed: At least 0. Another seed has other persons and other cameras.
        num_train: Identities for training, at least 1.
        num_test: Identities for testing, at least 1.
        num_cameras: At least 2.
        images_per_camera: Mean number of pictures of a training identity in one of its cameras;
            the number varies evenly between 1 and twice the mean less one. Test identities have
            at least 2.
        num_distractors: Pictures of identity 0000, at least 0.
        height: Pixels, at least 16.
        width: Pixels, at least 8.
        quality: Quality of the JPEG files, 1 to 95.
        persons_from: Number of persons of this seed to pass over: two sets with one seed and
            ranges that do not overlap have the same cameras and no person in common.

    Raises:
        ValueError: An argument is out of its range.
        FileExistsError: `root` holds something else.
    """
    check_range(
        seed=seed,
        num_train=num_train,
        num_test=num_test,
        num_cameras=num_cameras,
        images_per_camera=images_per_camera,
        num_distractors=num_distractors,
        height=height,
        width=width,
        quality=quality,
        persons_from=persons_from,
    )
    if num_train + num_test > 9999:
        raise ValueError(
            f"num_train + num_test: expected at most 9999, four digits in a file name, "
            f"got {num_train} + {num_test}"
        )
    if quality > 95:
        raise ValueError(f"quality: expected an integer of at most 95, got {quality}")
    root = Path(root)
    readme = (
        "Pedestrians drawn by reid.data.synthetic.draw_persons, in the layout of Market-1501.\n"
        "Nobody in these pictures exists.\n\n"
        f"seed={seed} persons_from={persons_from} num_train={num_train} num_test={num_test}\n"
        f"num_cameras={num_cameras} images_per_camera={images_per_camera} "
        f"num_distractors={num_distractors}\n"
        f"height={height} width={width} quality={quality}\n"
    )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root}: expected nothing or an empty folder")
    cameras = [sample_camera(_stream(seed, _CAMERA, cam)) for cam in range(1, num_cameras + 1)]

    def save(folder: Path, pid: str, cam: int, frame: int, pixels: npt.NDArray[np.uint8]) -> None:
        path = folder / f"{pid}_c{cam}s1_{frame:06d}_00.jpg"
        Image.fromarray(pixels).save(path, format="JPEG", quality=quality)

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        partial = Path(scratch) / "persons"
        train, query, gallery = (
            partial / name for name in ("bounding_box_train", "query", "bounding_box_test")
        )
        for folder in (train, query, gallery):
            folder.mkdir(parents=True)
        for pid in range(1, num_train + num_test + 1):
            index, testing = persons_from + pid, pid > num_train
            person = sample_person(_stream(seed, _PERSON, index))
            visits = _stream(seed, _VISITS, index)
            seen = int(visits.integers(2, num_cameras + 1))
            for cam in sorted(int(c) + 1 for c in visits.permutation(num_cameras)[:seen]):
                count = int(visits.integers(1, 2 * images_per_camera))
                for frame in range(1, (max(count, 2) if testing else count) + 1):
                    rng = _stream(seed, _IMAGE, index, cam, frame)
                    pixels = _expose(person, cameras[cam - 1], rng, height, width)
                    folder = (query if frame == 1 else gallery) if testing else train
                    save(folder, f"{pid:04d}", cam, frame, pixels)
        for frame in range(1, num_distractors + 1):
            rng = _stream(seed, _DISTRACTOR, persons_from, frame)
            cam, nobody = int(rng.integers(num_cameras)) + 1, rng.random() < 0.3
            stranger = None if nobody else sample_person(rng)
            error = 1.0 if rng.random() < 0.5 else 4.0
            pixels = _expose(stranger, cameras[cam - 1], rng, height, width, error)
            save(gallery, "0000", cam, frame, pixels)
        for frame in range(1, (num_distractors + 9) // 10 + 1):
            rng = _stream(seed, _JUNK, persons_from, frame)
            cam = int(rng.integers(num_cameras)) + 1
            index = persons_from + num_train + 1 + int(rng.integers(num_test))
            person = sample_person(_stream(seed, _PERSON, index))
            save(
                gallery,
                "-1",
                cam,
                frame,
                _expose(person, cameras[cam - 1], rng, height, width, error=5.0),
            )
        (partial / "README.txt").write_text(readme, encoding="utf-8")
        try:
            partial.rename(root)
        except OSError:
            # Another process may have drawn the same set meanwhile; anything else is an error.
            drawn = root / "README.txt"
            if not drawn.is_file() or read_text(drawn) != readme:
                raise
