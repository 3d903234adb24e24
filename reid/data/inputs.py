"""Turns paths, Pillow's images, arrays and tensors into RGB pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from reid.data.images import picture_pixels, read_image
from reid.data.resize import Pixels
from reid.shipped import tool
from reid.structures import DataError

Picture: TypeAlias = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor
"""One picture; see `to_pixels`."""
Pictures: TypeAlias = Picture | Iterable[Picture]
"""One picture, several of any kinds and sizes, or an array or tensor of several."""

_ARRAY = "a uint8 array (height, width, 3), or (height, width) in grey"
_TENSOR = "a tensor (3, height, width), uint8 or floats from 0 to 1, or (1, height, width) in grey"


def each_picture(images: Pictures) -> Iterator[Picture]:
    """The pictures one by one, also if only one is given.

    An array (N, height, width, 3) and a tensor (N, 3, height, width) are N pictures.

    Raises:
        ValueError: The argument is neither a picture nor several pictures.
    """
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)):
        yield images
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray, memoryview)):
        yield from images
    else:
        raise ValueError(
            f"expected a picture or several, got {type(images).__name__}; a picture is a path, "
            f"Pillow's Image, {_ARRAY}, or {_TENSOR}"
        )


def to_pixels(image: Picture, where: str = "image", *, bgr: bool = False) -> Pixels:
    """A picture as RGB pixels (height, width, 3), contiguous.

    Args:
        image: The path of a file (see `read_image`); Pillow's Image; an array (height, width, 3)
            of uint8, or (height, width) or (height, width, 1) in grey; a tensor (3, height, width)
            or, in grey, (1, height, width), of uint8, or of floats from 0 to 1 as torchvision's
            `ToTensor` gives them, which are rounded to 256 levels. Anything else is an error.
        where: Names the picture in messages.
        bgr: Arrays and tensors have the blue channel first, as those of OpenCV.

    Raises:
        DataError: The file cannot be read.
        ValueError: The argument is not such a picture.
    """
    if isinstance(image, (str, Path)):
        if Path(image).is_dir():
            raise DataError(
                f"{image}: is a folder, expected a picture; pass its files, or extract it with "
                f"{tool('extract')}"
            )
        return read_image(str(image))
    if isinstance(image, Image.Image):
        try:
            return picture_pixels(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(image, Tensor):
        pixels = _from_tensor(image, where)
    elif isinstance(image, np.ndarray):
        pixels = _from_array(image, where)
    else:
        raise ValueError(
            f"{where}: expected a path, Pillow's Image, {_ARRAY}, or {_TENSOR}; got "
            f"{type(image).__name__}"
        )
    if bgr:
        pixels = pixels[:, :, ::-1]
    pixels = np.ascontiguousarray(pixels)
    # Compiled code treats a read-only array as another type and would be compiled again.
    return pixels if pixels.flags.writeable else pixels.copy()


def _from_array(image: npt.NDArray[np.generic], where: str) -> Pixels:
    """(height, width, 3) of an array."""
    right = image.dtype == np.uint8 and image.size > 0
    if right and image.ndim == 2:
        image = image[:, :, None]
    if not right or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"{where}: expected {_ARRAY}; got {image.dtype} {image.shape}{_hint(image)}"
        )
    return image if image.shape[2] == 3 else image.repeat(3, axis=2)  # type: ignore[return-value]


def _from_tensor(image: Tensor, where: str) -> Pixels:
    """(height, width, 3) of a tensor."""
    shape = tuple(image.shape)
    if image.ndim != 3 or shape[0] not in (1, 3) or not image.numel():
        raise ValueError(f"{where}: expected {_TENSOR}; got {image.dtype} {shape}")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{where}: expected floats from 0 to 1, got {low:g} to {high:g}; pass pixels "
                "without normalisation, which happens here"
            )
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"{where}: expected {_TENSOR}; got {image.dtype} {shape}")
    return np.asarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _hint(image: npt.NDArray[np.generic]) -> str:
    """What to do about an array of another type or shape."""
    if image.dtype.kind == "f":
        return "; multiply by 255 if its largest value is 1, and use .astype('uint8')"
    if image.ndim == 3 and image.shape[2] == 4:
        return "; remove the alpha channel: image[:, :, :3]"
    if image.ndim == 3 and image.shape[0] in (1, 3):
        return "; put channels last: image.transpose(1, 2, 0)"
    if image.ndim == 4:
        return "; pass the array of pictures alone, or its rows one by one"
    return ""
