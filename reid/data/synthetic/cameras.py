"""Made cameras: where they look, and what their image chain does to light and colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from reid.data.synthetic.paint import Range, between


@dataclass(frozen=True)
class CameraStyle:
    """How much cameras differ: each camera gets a number between (low, high).

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


Weather = Literal["fair", "fog", "dusk"]
WEATHERS: dict[Weather, CameraStyle] = {
    "fair": CameraStyle(),
    "fog": CameraStyle(haze=(0.35, 0.6), saturation=(0.2, 0.6), blur=(0.8, 1.8)),
    "dusk": CameraStyle(exposure=(-1.7, -0.9), saturation=(0.2, 0.7), noise=(8.0, 18.0)),
}
"""The cameras' style in each weather: a whole set has one, so that sets are different domains."""


@dataclass(frozen=True)
class PictureStyle:
    """How much the pictures of one camera differ.

    Attributes:
        turn: Spread of walking directions around the camera's path, in radians.
        flicker: Change of exposure, as a power of two.
        shift: Error of the box's centre, in heights of a person.
        zoom: Error of the box's scale, in powers of two.
        pole: Probability of an obstacle in front of the person.
        crowd: Probability of another person beside, in front or behind.
        shade: Probability that a shadow falls over a part of the picture.
    """

    turn: float = 0.5
    flicker: float = 0.25
    shift: float = 0.06
    zoom: float = 0.2
    pole: float = 0.25
    crowd: float = 0.25
    shade: float = 0.3


@dataclass(frozen=True)
class ImageChain:
    """From the light of a scene to pixels; see `CameraStyle` for the units.

    Attributes:
        gains: Gains of red, green and blue.
        gamma: Exponent on intensities.
        saturation: 0 is grey, 1 is unchanged.
        haze: Share of grey in the picture.
        haze_level: The grey, in [0, 255].
        blur: Standard deviation in pixels of an image 128 high.
        noise: Standard deviation in grey levels.
        resolution: Share of the pixels in each direction.
    """

    gains: tuple[float, float, float]
    gamma: float
    saturation: float
    haze: float
    haze_level: float
    blur: float
    noise: float
    resolution: float

    def develop(
        self, image: Image.Image, exposure: float, rng: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """The camera's pixels (H, W, 3): light and colours, haze, optics, then the sensor.

        Args:
            image: What the camera looks at.
            exposure: Gain of all channels in this picture, besides the camera's own.
            rng: Random numbers of the noise.
        """
        width, height = image.size
        image = image.convert("RGB", self._colour_matrix(exposure))
        table = [
            round(
                (1.0 - self.haze) * 255.0 * (level / 255.0) ** self.gamma
                + self.haze * self.haze_level
            )
            for level in range(256)
        ]
        image = image.point(table * 3)
        sensor = (max(1, round(width * self.resolution)), max(1, round(height * self.resolution)))
        image = image.filter(ImageFilter.GaussianBlur(self.blur * height / 128.0))
        image = image.resize(sensor, Image.Resampling.BILINEAR).resize((width, height))
        noise = rng.standard_normal((height, width, 3), dtype=np.float32) * self.noise
        pixels = np.asarray(image, dtype=np.float32) + noise
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)

    def _colour_matrix(self, exposure: float) -> tuple[float, ...]:
        """Pillow's 3 x 4 matrix, row after row: saturation, then gains."""
        grey = 1.0 - self.saturation
        luma = (0.299 * grey, 0.587 * grey, 0.114 * grey)
        matrix: list[float] = []
        for channel, gain in enumerate(self.gains):
            row = [
                (part + self.saturation * (source == channel)) * gain * exposure
                for source, part in enumerate(luma)
            ]
            matrix += [*row, 0.0]
        return tuple(matrix)


@dataclass(frozen=True)
class Camera:
    """What stays the same in all pictures of one camera.

    Attributes:
        scene: Seed of the scene behind the persons.
        path: Usual walking direction in radians; 0 is towards the camera. People also come back.
        chain: How light becomes pixels.
        pitch: Looking down; 0 is level.
        light: From the left (-1) or the right (1).
        style: What changes between pictures.
    """

    scene: int
    path: float
    chain: ImageChain
    pitch: float
    light: float
    style: PictureStyle


def synthesise_camera(
    rng: np.random.Generator,
    style: CameraStyle | None = None,
    picture_style: PictureStyle | None = None,
) -> Camera:
    """Makes up one camera.

    Args:
        rng: Random numbers of the camera.
        style: The bounds of its numbers; None: the constants of `CameraStyle`.
        picture_style: What changes between its pictures; None: the constants of `PictureStyle`.
    """
    style = style or CameraStyle()
    exposure = between(rng, style.exposure)
    red, green, blue = (2.0 ** (exposure + between(rng, style.cast)) for _ in range(3))
    # Keep the order of the fields: it decides which random numbers each gets.
    return Camera(
        scene=int(rng.integers(2**31)),
        path=between(rng, (0.0, math.pi)),
        chain=ImageChain(
            gains=(red, green, blue),
            gamma=between(rng, style.gamma),
            saturation=between(rng, style.saturation),
            haze=between(rng, style.haze),
            haze_level=between(rng, (90.0, 220.0)),
            blur=between(rng, style.blur),
            noise=between(rng, style.noise),
            resolution=between(rng, style.resolution),
        ),
        pitch=between(rng, style.pitch),
        light=between(rng, style.light),
        style=picture_style or PictureStyle(),
    )
