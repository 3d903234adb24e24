from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid.data.synthetic import ImageChain, PersonSet, draw_persons

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c([1-9])s1_(\d{6})_00\.jpg")
SMALL = {"num_train": 3, "num_test": 3, "num_cameras": 3, "images_per_camera": 2}
TINY = {**SMALL, "num_distractors": 4, "height": 32, "width": 16}


def _contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _labels(folder: Path) -> list[tuple[int, int]]:
    matches = [NAME.fullmatch(path.name) for path in sorted(folder.iterdir())]
    assert all(matches)
    return [(int(match[1]), int(match[2])) for match in matches if match]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "persons"
    persons = PersonSet(
        seed=3, num_train=4, num_test=24, num_cameras=4, images_per_camera=3, num_distractors=20
    )
    draw_persons(root, persons)
    return root


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_persons(tmp_path / name, PersonSet(seed=5, **TINY))
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_another_seed_gives_other_persons_and_cameras(tmp_path: Path) -> None:
    draw_persons(tmp_path / "a", PersonSet(seed=5, **TINY))
    draw_persons(tmp_path / "b", PersonSet(seed=6, **TINY))
    pictures = [
        {data for name, data in _contents(tmp_path / root).items() if name.endswith("jpg")}
        for root in "ab"
    ]
    assert not pictures[0] & pictures[1]


def test_weather_changes_the_pictures_of_the_same_persons(tmp_path: Path) -> None:
    means = {}
    for weather in ("fair", "fog", "dusk"):
        draw_persons(tmp_path / weather, PersonSet(seed=5, weather=weather, **TINY))
        paths = sorted((tmp_path / weather).rglob("*.jpg"))
        pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
        means[weather] = pictures.mean(), pictures.std()
    assert means["dusk"][0] < 0.8 * means["fair"][0]  # darker
    assert means["fog"][1] < 0.9 * means["fair"][1]  # greyer
    with pytest.raises(ValueError, match="weather: expected fair, fog, dusk, got 'rain'"):
        PersonSet(seed=5, weather="rain", **TINY)  # type: ignore[arg-type]


def test_persons_from_passes_over_persons_and_keeps_the_cameras(tmp_path: Path) -> None:
    draw_persons(tmp_path / "all", PersonSet(seed=5, **TINY))
    draw_persons(tmp_path / "rest", PersonSet(seed=5, persons_from=1, **TINY))
    everybody, rest = (_contents(tmp_path / name) for name in ("all", "rest"))

    def train(contents: dict[str, bytes], pid: int) -> dict[str, bytes]:
        start = f"bounding_box_train/{pid:04d}"
        return {name[len(start) :]: data for name, data in contents.items() if start in name}

    # The second person of the one set is the first of the other: same cameras, same pixels.
    assert train(everybody, 2)
    assert train(everybody, 2) == train(rest, 1)
    assert train(everybody, 3) == train(rest, 2)


def test_layout_and_counts(drawn: Path) -> None:
    train, query, gallery = (_labels(drawn / name) for name in FOLDERS)
    assert {pid for pid, _ in train} == set(range(1, 5))
    assert {pid for pid, _ in query} == set(range(5, 29))
    assert {pid for pid, _ in gallery} == {-1, 0, *range(5, 29)}
    assert Counter(pid for pid, _ in gallery)[0] == 20
    assert Counter(pid for pid, _ in gallery)[-1] == 2
    assert {cam for _, cam in train + query + gallery} <= set(range(1, 5))
    assert max(Counter(query).values()) == 1
    # The query is one more picture of the 2 to 5 of a test identity in one camera.
    counts = Counter(pair for pair in query + gallery if pair[0] > 0)
    assert set(counts.values()) <= {2, 3, 4, 5}
    assert set(Counter(train).values()) <= {1, 2, 3, 4, 5}
    for labels in (train, query):
        cameras = Counter(pid for pid, _ in set(labels))
        assert min(cameras.values()) >= 2
    assert "seed=3" in (drawn / "README.txt").read_text(encoding="utf-8")
    assert {path.name for path in drawn.iterdir()} == {*FOLDERS, "README.txt", "joints.npz"}


def test_pictures_are_jpeg_of_the_size_asked(drawn: Path) -> None:
    for name in FOLDERS:
        with Image.open(next((drawn / name).iterdir())) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


@pytest.mark.parametrize("images_per_camera", [1, 3])
def test_every_query_has_a_match_in_another_camera(tmp_path: Path, images_per_camera: int) -> None:
    options = {**TINY, "num_test": 12, "images_per_camera": images_per_camera}
    draw_persons(tmp_path / "set", PersonSet(seed=1, **options))
    query, gallery = (_labels(tmp_path / "set" / name) for name in FOLDERS[1:])
    for pid, cam in query:
        assert any(other == pid and camera != cam for other, camera in gallery)


def _mean_average_precision(
    query: np.ndarray,
    gallery: np.ndarray,
    query_labels: list[tuple[int, int]],
    gallery_labels: list[tuple[int, int]],
) -> float:
    precisions = []
    for feature, (pid, cam) in zip(query, query_labels, strict=True):
        keep = [i for i, (p, c) in enumerate(gallery_labels) if p >= 0 and (p, c) != (pid, cam)]
        order = np.argsort(-(gallery[keep] @ feature), kind="stable")
        hits = np.flatnonzero([gallery_labels[keep[i]][0] == pid for i in order])
        precisions.append(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))
    return float(np.mean(precisions))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((32, 64)), dtype=np.float64).ravel()


def _histogram(image: Image.Image) -> np.ndarray:
    red, green, blue = (np.asarray(image).astype(np.int64) // 32).reshape(-1, 3).T
    return np.bincount(64 * red + 8 * green + blue, minlength=512).astype(np.float64)


def test_neither_pixels_nor_histograms_find_persons(drawn: Path) -> None:
    for describe in (_pixels, _histogram):
        features = []
        for name in FOLDERS[1:]:
            images = [Image.open(path) for path in sorted((drawn / name).iterdir())]
            rows = np.stack([describe(image) for image in images])
            features.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        labels = [_labels(drawn / name) for name in FOLDERS[1:]]
        assert _mean_average_precision(*features, *labels) < 0.35


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", -1, "seed: expected an integer of at least 0, got -1"),
        ("num_train", 0, "num_train: expected an integer of at least 1, got 0"),
        ("num_train", 9999, "at most 9999, four digits"),
        ("num_test", 0, "num_test: expected"),
        ("num_cameras", 1, "num_cameras: expected an integer of at least 2, got 1"),
        ("images_per_camera", 0, "images_per_camera: expected"),
        ("images_per_camera", 2.5, "images_per_camera: expected an integer .*got 2.5"),
        ("num_distractors", -1, "num_distractors: expected"),
        ("height", 8, "height: expected"),
        ("width", 4, "width: expected"),
        ("persons_from", -1, "persons_from: expected"),
    ],
)
def test_a_wrong_number_is_named(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PersonSet(**{"seed": 0, **TINY, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("quality", "bound"), [(0, "at least 1"), (96, "at most 95")])
def test_a_wrong_quality_is_named(tmp_path: Path, quality: int, bound: str) -> None:
    with pytest.raises(ValueError, match=f"quality: expected an integer of {bound}, got {quality}"):
        draw_persons(tmp_path / "set", PersonSet(seed=0, **TINY), quality)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_drawing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    develop, drawn = ImageChain.develop, []

    def interrupt(*args: object) -> object:
        drawn.append(args)
        if len(drawn) > 10:
            raise KeyboardInterrupt
        return develop(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageChain, "develop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_persons(tmp_path / "set", PersonSet(seed=0, **TINY))
    assert len(drawn) == 11
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileExistsError, match="expected nothing or an empty folder"):
        draw_persons(tmp_path, PersonSet(seed=0, **TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    draw_persons(tmp_path / "set", PersonSet(seed=0, **TINY))
    assert (tmp_path / "set" / "README.txt").is_file()


@pytest.mark.parametrize("same", [True, False])
def test_a_folder_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """Two processes draw at once: the second accepts the same set and refuses another one."""
    root, rename = tmp_path / "set", Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        draw_persons(root, PersonSet(seed=0 if same else 1, **TINY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    if same:
        draw_persons(root, PersonSet(seed=0, **TINY))
    else:
        with pytest.raises(OSError, match="set"):
            draw_persons(root, PersonSet(seed=0, **TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
