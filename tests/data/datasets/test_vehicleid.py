from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import SplitCounts, VehicleID
from reid.registry import DATASET, ConfigError, build
from reid.structures import DataError

IMAGES = [f"{number:07d}" for number in range(1, 41)]
# Vehicle 5 has 3 test images, vehicle 8 has 2, vehicle 9 one, vehicles 20 to 24 four each.
PIDS = [5] * 3 + [8] * 2 + [9] + [20 + i // 4 for i in range(20)]


@pytest.fixture(params=["VehicleID_V1.0", "vehicleid/VehicleID_V1.0", "vehicleid"])
def folder(plant: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    made = plant(str(request.param), [f"image/{name}.jpg" for name in IMAGES])
    (made / "train_test_split").mkdir()
    lists = {
        "train_list.txt": zip(IMAGES[30:34], [1, 1, 2, 3], strict=True),
        "test_list_800.txt": zip(IMAGES[:26], PIDS, strict=True),
        "test_list_1600.txt": zip(IMAGES[:5], PIDS[:5], strict=True),
    }
    for name, rows in lists.items():
        text = "".join(f"{image} {pid}\n" for image, pid in rows)
        (made / "train_test_split" / name).write_text(text)
    return made


def test_training_list(folder: Path) -> None:
    train = VehicleID().load("train")
    assert [(Path(r.path), r.pid, r.camid) for r in train] == [
        (folder / "image" / f"{name}.jpg", pid, -1)
        for name, pid in zip(IMAGES[30:34], [1, 1, 2, 3], strict=True)
    ]


def test_one_gallery_image_of_each_vehicle(folder: Path) -> None:
    dataset = VehicleID()
    query, gallery = dataset.load("query"), dataset.load("gallery")
    assert sorted(r.pid for r in gallery) == [5, 8, 9, 20, 21, 22, 23, 24]
    assert SplitCounts.of(query) == SplitCounts(identities=7, images=18, cameras=0)
    assert sorted(Path(r.path).stem for r in [*query, *gallery]) == IMAGES[:26]
    small = VehicleID(test_size=1600)
    assert (len(small.load("query")), len(small.load("gallery"))) == (3, 2)
    assert small.name == "VehicleID-1600"


def test_the_gallery_depends_on_seed_and_names_alone(folder: Path) -> None:
    def drawn(seed: int) -> set[str]:
        return {Path(r.path).stem for r in VehicleID(gallery_seed=seed).load("gallery")}

    draws = [drawn(seed) for seed in range(10)]
    assert draws[0] == drawn(0)
    assert len({frozenset(draw) for draw in draws}) > 5
    path = folder / "train_test_split" / "test_list_800.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert drawn(0) == draws[0]
    # SHA-256 of 0/0000001, 0/0000002, 0/0000003, as sha256sum gives it: c4f0..., dd6d..., 33f5...
    assert draws[0] & set(IMAGES[:3]) == {"0000003"}


def test_published_counts_add_up_to_the_lists() -> None:
    for size, images in {800: 6493, 1600: 13377, 2400: 19777}.items():
        published = VehicleID(test_size=size).published()  # type: ignore[arg-type]
        assert published["gallery"] == SplitCounts(size, size, 0)
        assert (published["query"].images or 0) + size == images


def test_size_of_the_test() -> None:
    with pytest.raises(ConfigError, match="test_size: expected one of 800, 1600, 2400, got 900"):
        build(DATASET, {"name": "VehicleID", "test_size": 900}, "datasets.train")
    with pytest.raises(ValueError, match="test_size: expected 800, 1600 or 2400, got 900"):
        VehicleID(test_size=900)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000001", "does not parse"),
        ("0000001 x", "does not parse"),
        ("../image/0000001 3", "leaves the folder"),
        ("/0000001 3", "leaves the folder"),
    ],
)
def test_a_line_that_is_wrong(folder: Path, line: str, message: str) -> None:
    (folder / "train_test_split" / "train_list.txt").write_text(f"0000001 3\n{line}\n")
    with pytest.raises(DataError, match=rf"train_list\.txt, line 2: .* {message}"):
        VehicleID().load("train")


def test_lists_and_images_that_are_missing(folder: Path) -> None:
    with pytest.raises(DataError, match=r"test_list_2400\.txt: there is no such list"):
        VehicleID(test_size=2400).load("query")
    (folder / "train_test_split" / "train_list.txt").write_text("0000099 3\n")
    with pytest.raises(DataError, match=r"0000099\.jpg: there is no such image, but .*train_list"):
        VehicleID().load("train")
