"""The set: which person is seen by which camera, and the files in the layout of Market-1501."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from reid.data.synthetic.cameras import WEATHERS, Camera, Weather, synthesise_camera
from reid.data.synthetic.persons import Person, synthesise_person
from reid.data.synthetic.pictures import MIN_HEIGHT, MIN_WIDTH, Joints, at_least, draw_image
from reid.files import read_text

# First number of a seed after the user's: one stream of random numbers for each kind of thing.
_PERSON, _CAMERA, _VISITS, _IMAGE, _DISTRACTOR, _JUNK = range(6)
JOINTS_FILE = "joints.npz"
"""Name of the file with the joints of a set's persons; see `draw_persons`."""
_TRAIN, _QUERY, _GALLERY = "bounding_box_train", "query", "bounding_box_test"
_LEAST = {
    "seed": 0,
    "num_train": 1,
    "num_test": 1,
    "num_cameras": 2,
    "images_per_camera": 1,
    "num_distractors": 0,
    "height": MIN_HEIGHT,
    "width": MIN_WIDTH,
    "persons_from": 0,
}


class Shot(NamedTuple):
    """A picture of the set before it is drawn.

    Attributes:
        folder: Name of its folder.
        pid: Identity in the file's name.
        camera: Number of the camera, from 1.
        frame: Frame in the file's name.
        person: Who is in it; None: nobody.
        rng: Random numbers of this picture.
        box_error: Factor of the errors of the box.
    """

    folder: str
    pid: str
    camera: int
    frame: int
    person: Person | None
    rng: np.random.Generator
    box_error: float = 1.0


@dataclass(frozen=True)
class PersonSet:
    """A set of made persons.

    Identities 1 to `num_train` are for training, the next `num_test` for testing. Each is seen by
    a random 2 to `num_cameras` cameras. The first picture of a test identity in each of its cameras
    is a query, the others (at least one for each camera) are in the gallery. The gallery also holds
    `num_distractors` pictures of nobody in particular (identity 0000) and a tenth as many badly
    boxed pictures of test identities (junk, identity -1).

    Attributes:
        seed: At least 0. Each seed gives other persons and other cameras.
        num_train: Identities for training, at least 1.
        num_test: Identities for testing, at least 1.
        num_cameras: At least 2.
        images_per_camera: Mean number of pictures of a training identity in one of its cameras;
            the number varies evenly between 1 and twice the mean less one. Test identities have
            at least 2.
        num_distractors: Pictures of identity 0000, at least 0.
        height: Pixels, at least 16.
        width: Pixels, at least 8.
        persons_from: Number of persons of this seed to pass over: two sets with one seed and
            ranges that do not overlap have the same cameras and no person in common.
        weather: `fair`, `fog` or `dusk`; see `WEATHERS`.

    Raises:
        ValueError: A number is out of its range, or there is no such weather.
    """

    seed: int
    num_train: int
    num_test: int
    num_cameras: int
    images_per_camera: int
    num_distractors: int
    height: int = 128
    width: int = 64
    persons_from: int = 0
    weather: Weather = "fair"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            at_least(name, getattr(self, name), least)
        if self.weather not in WEATHERS:
            raise ValueError(f"weather: expected {', '.join(WEATHERS)}, got {self.weather!r}")
        if self.num_train + self.num_test > 9999:
            raise ValueError(
                f"num_train + num_test: expected at most 9999, four digits in a file name, "
                f"got {self.num_train} + {self.num_test}"
            )

    def cameras(self) -> list[Camera]:
        """The cameras in the order of their numbers, from 1."""
        numbers = range(1, self.num_cameras + 1)
        style = WEATHERS[self.weather]
        return [synthesise_camera(self._stream(_CAMERA, number), style) for number in numbers]

    def shots(self) -> Iterator[Shot]:
        """All pictures of the set."""
        for pid in range(1, self.num_train + self.num_test + 1):
            yield from self._shots_of(pid)
        yield from self._distractors()
        yield from self._junk()

    def _shots_of(self, pid: int) -> Iterator[Shot]:
        index, testing = self.persons_from + pid, pid > self.num_train
        person = self._person(pid)
        visits = self._stream(_VISITS, index)
        count = int(visits.integers(2, self.num_cameras + 1))
        for camera in sorted(int(c) + 1 for c in visits.permutation(self.num_cameras)[:count]):
            images = int(visits.integers(1, 2 * self.images_per_camera))
            for frame in range(1, (max(images, 2) if testing else images) + 1):
                folder = (_QUERY if frame == 1 else _GALLERY) if testing else _TRAIN
                rng = self._stream(_IMAGE, index, camera, frame)
                yield Shot(folder, f"{pid:04d}", camera, frame, person, rng)

    def _distractors(self) -> Iterator[Shot]:
        for frame in range(1, self.num_distractors + 1):
            rng = self._stream(_DISTRACTOR, self.persons_from, frame)
            camera, nobody = int(rng.integers(self.num_cameras)) + 1, rng.random() < 0.3
            stranger = None if nobody else synthesise_person(rng)
            box_error = 1.0 if rng.random() < 0.5 else 4.0
            yield Shot(_GALLERY, "0000", camera, frame, stranger, rng, box_error)

    def _junk(self) -> Iterator[Shot]:
        for frame in range(1, (self.num_distractors + 9) // 10 + 1):
            rng = self._stream(_JUNK, self.persons_from, frame)
            camera = int(rng.integers(self.num_cameras)) + 1
            person = self._person(self.num_train + 1 + int(rng.integers(self.num_test)))
            yield Shot(_GALLERY, "-1", camera, frame, person, rng, box_error=5.0)

    def _person(self, pid: int) -> Person:
        return synthesise_person(self._stream(_PERSON, self.persons_from + pid))

    def _stream(self, kind: int, *index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, kind, *index)))


def draw_persons(root: Path, persons: PersonSet, quality: int = 90) -> None:
    """Draws a set of persons as JPEG files in the layout of Market-1501.

    Writes `bounding_box_train`, `query` and `bounding_box_test` with names
    `{pid:04d}_c{camera}s1_{frame:06d}_00.jpg`, a `README.txt`, and the persons' joints, as they
    were drawn, in `joints.npz`: `names` (N,) of the pictures, as folder/file, `joints` (N, 17, 3),
    see `Joints`, and `size` (H, W). The folder appears under its name only when it is complete.

    Args:
        root: Folder to create; may exist if it is empty.
        persons: The set.
        quality: Quality of the JPEG files, 1 to 95.

    Raises:
        ValueError: The quality is out of its range.
        FileExistsError: `root` holds something else.
    """
    at_least("quality", quality, 1)
    if quality > 95:
        raise ValueError(f"quality: expected an integer of at most 95, got {quality}")
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root}: expected nothing or an empty folder")
    readme = _readme(persons, quality)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        whole = Path(scratch) / "persons"
        for folder in (_TRAIN, _QUERY, _GALLERY):
            (whole / folder).mkdir(parents=True)
        cameras = persons.cameras()
        joints: dict[str, Joints] = {}
        for shot in persons.shots():
            name = f"{shot.folder}/{shot.pid}_c{shot.camera}s1_{shot.frame:06d}_00.jpg"
            joints[name] = np.zeros((17, 3), np.float32)  # nobody
            pixels = draw_image(
                shot.person,
                cameras[shot.camera - 1],
                shot.rng,
                persons.height,
                persons.width,
                shot.box_error,
                note_joints=partial(joints.__setitem__, name),
            )
            Image.fromarray(pixels).save(whole / name, format="JPEG", quality=quality)
        np.savez_compressed(
            whole / JOINTS_FILE,
            names=[*joints],
            joints=np.stack([*joints.values()]),
            size=(persons.height, persons.width),
        )
        (whole / "README.txt").write_text(readme, encoding="utf-8")
        try:
            whole.rename(root)
        except OSError:
            # Another process may have drawn the same set meanwhile; anything else is an error.
            present = root / "README.txt"
            if not present.is_file() or read_text(present) != readme:
                raise


def _readme(persons: PersonSet, quality: int) -> str:
    return (
        "Pedestrians drawn by reid.data.synthetic.draw_persons, in the layout of Market-1501.\n"
        "Nobody in these pictures exists.\n\n"
        f"seed={persons.seed} persons_from={persons.persons_from} "
        f"num_train={persons.num_train} num_test={persons.num_test}\n"
        f"num_cameras={persons.num_cameras} images_per_camera={persons.images_per_camera} "
        f"num_distractors={persons.num_distractors}\n"
        f"height={persons.height} width={persons.width} quality={quality}\n"
        + (f"weather={persons.weather}\n" if persons.weather != "fair" else "")
    )
