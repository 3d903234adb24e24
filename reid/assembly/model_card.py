"""The facts about a trained model that a caller needs to prepare pictures for it."""

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
"""The key of the card's JSON in an ONNX file's metadata."""

_SHOWN = 12


@dataclass(frozen=True)
class ModelCard:
    """Preprocessing, cameras and origin of a model.

    Attributes:
        size: (H, W) of the input in pixels.
        mean: Per channel, for RGB in [0, 1].
        std: Per channel, for RGB in [0, 1].
        interpolation: Of the resize, which is antialiased as in Pillow.
        cameras: (data set, camera) by the camera's number in the model: the data set's `site`, and
            the camera's name there, or its number as text if it has no name. The site is empty
            if the weights do not store the data set of their cameras. A camera without training
            images is None. None in place of the list: the model has not learned cameras.
        dimension: D of the features.
        provenance: Where the model comes from. `weights_sha256` is the SHA-256 of the original
            weights file, whatever format the model has now.
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
            settings: How its input is prepared.
            cameras: The cameras that it has learned, by number; None or empty: it has learned none.
            dimension: D of the features.
            provenance: See the class.
            flip: See the class.
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
            path: The model's file, for messages.

        Raises:
            WeightsError: The text is not the JSON of a card.
        """
        try:
            card = from_mapping(cls, json.loads(text), METADATA_KEY)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: metadata: {error}; export the model again") from error
        return card

    def to_json(self) -> str:
        """The card as JSON, for a file's metadata."""
        return json.dumps(asdict(self))

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the model's original weights file; empty: unknown."""
        value = self.provenance.get("weights_sha256", "")
        return value if isinstance(value, str) else ""

    @property
    def fingerprint(self) -> str:
        """A text that is the same for all models whose features can be compared.

        Such models have the same weights, in any format, and prepare their input in the same way.
        """
        parts = asdict(self)
        for name in ("provenance", "cameras"):
            del parts[name]
        parts["weights_sha256"] = self.weights_sha256
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def learned_cameras(self) -> list[Camera] | None:
        """The cameras, for `renumber_cameras`; None: it has none, or their data set is unknown."""
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
            camera: Its number in the model, its name, or (data set, name) if several data sets
                have a camera of that name. None or -1: a camera that the model has not learned.

        Returns:
            A number from 0; -1: not learned.

        Raises:
            ValueError: The model knows no camera of that name, or several.
        """
        if camera is None or camera == -1:
            return -1
        if self.cameras is None:
            raise ValueError(
                f"camera {camera!r}: this model has not learned cameras; leave `cameras` out"
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
        """The transform that turns a picture's pixels into the model's input."""
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
