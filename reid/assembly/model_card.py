"""What a trained model says of itself: all that one must know to give it pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from reid.assembly.cameras import Camera
from reid.checking import from_mapping
from reid.config import Deviation, InputConfig, Interpolation, Mean, Positive, Side
from reid.data.transforms import ImageTransform
from reid.modeling.weights import WeightsError

METADATA_KEY = "reid"
"""Under which an ONNX file's metadata has the JSON of a card."""

_SHOWN = 12


@dataclass(frozen=True)
class ModelCard:
    """Preprocessing, cameras and origin of a model.

    Attributes:
        size: (H, W) of the input in pixels.
        mean: Per channel, for RGB in [0, 1].
        std: Per channel, for RGB in [0, 1].
        interpolation: Of the resize, antialiased as Pillow's.
        cameras: (data set, camera) by the camera's number in the model: the data set's `site`, and
            the camera's name there, or its number as text where it has none. The site is empty
            where the weights do not say whose cameras they know. A camera without training images
            is None. None in place of the list: the model knows of no cameras.
        dimension: D of the features.
        provenance: Where the model comes from. `weights_sha256` is the SHA-256 of the weights file
            that it was made of, in any format that it has now.
        flip: Whether features are the mean of those of an image and of its mirror image.
    """

    size: tuple[Side, Side]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    interpolation: Interpolation
    cameras: list[tuple[str, str] | None] | None
    dimension: Positive
    provenance: dict[str, Any] = field(default_factory=dict)
    flip: bool = False

    @classmethod
    def of(
        cls,
        settings: InputConfig,
        cameras: Sequence[Camera] | None,
        dimension: int,
        provenance: Mapping[str, Any],
        *,
        flip: bool = False,
    ) -> ModelCard:
        """The card of a model.

        Args:
            settings: How its pictures are made.
            cameras: That it has learned, by number; None or none at all: it knows of no cameras.
            dimension: D of the features.
            provenance: See above.
            flip: See above.
        """
        return cls(
            settings.size,
            settings.pixel_mean,
            settings.pixel_std,
            settings.test_interpolation,
            [_pair(camera) for camera in cameras] if cameras else None,
            dimension,
            dict(provenance),
            flip,
        )

    @classmethod
    def from_json(cls, text: str, path: str) -> ModelCard:
        """The card that `to_json` wrote.

        Args:
            text: JSON.
            path: Of the model's file, for messages.

        Raises:
            WeightsError: The text is no such JSON.
        """
        try:
            card = from_mapping(cls, json.loads(text), METADATA_KEY)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: its metadata: {error}; export the model anew") from error
        return card

    def to_json(self) -> str:
        """The card as JSON, for a file's metadata."""
        return json.dumps(asdict(self))

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file that the model was made of; empty: unknown."""
        value = self.provenance.get("weights_sha256", "")
        return value if isinstance(value, str) else ""

    @property
    def fingerprint(self) -> str:
        """The same for all models whose features can be compared.

        These have the same weights, in whatever format, and make their input in the same way.
        """
        parts = asdict(self)
        for name in ("provenance", "cameras"):
            del parts[name]
        parts["weights_sha256"] = self.weights_sha256
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def learned_cameras(self) -> list[Camera] | None:
        """The cameras, for `renumber_cameras`; None: it knows of none, or not whose they are."""
        if self.cameras is None or not any(camera and camera[0] for camera in self.cameras):
            return None
        return [
            Camera("", place, "", seen=False)
            if camera is None
            else Camera(camera[0], int(camera[1]) if camera[1].isdecimal() else place, camera[1])
            for place, camera in enumerate(self.cameras)
        ]

    def camera_number(self, camera: str | int | tuple[str, str] | None) -> int:
        """The number in the model of a camera.

        Args:
            camera: Its number in the model, its name, or (data set, name) where several data sets
                have a camera of that name. None or -1: a camera that the model has not learned.

        Returns:
            From 0; -1: not learned.

        Raises:
            ValueError: The model knows no such camera, or several.
        """
        if camera is None or camera == -1:
            return -1
        if self.cameras is None:
            raise ValueError(
                f"camera {camera!r}: this model knows of no cameras; leave cameras away"
            )
        places = [
            place
            for place, known in enumerate(self.cameras)
            if known is not None
            and (camera in (known, place) or camera == known[1])
            and not isinstance(camera, bool)
        ]
        if len(places) == 1:
            return places[0]
        if places:
            choices = ", ".join(repr(self.cameras[place]) for place in places)
            raise ValueError(f"camera {camera!r}: there are several: {choices}; pass one of these")
        raise ValueError(
            f"camera {camera!r}: the model has not learned it; it knows {self._camera_text()}; "
            "pass None for any other camera"
        )

    def transform(self) -> ImageTransform:
        """From a picture's pixels to the model's input."""
        return ImageTransform(self.size, self.mean, self.std, interpolation=self.interpolation)

    def _camera_text(self) -> str:
        known = [
            f"{place} {camera[1]!r}"
            for place, camera in enumerate(self.cameras or ())
            if camera is not None
        ]
        return ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "") or "none"


def _pair(camera: Camera) -> tuple[str, str] | None:
    return (camera.site, camera.name or str(camera.number)) if camera.seen else None
