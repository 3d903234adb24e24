from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import SplitCounts, VeRiWild
from reid.structures import DataError

INFO = """id/image;Camera ID;Time;Model;Type;Color
00001/000001;59;2018-03-10 09:47:03;Brand,Model;SUV;white
00001/000002;174;2018-03-10 09:47:09;Brand,Model;SUV;white
30672/000003;7;2018-03-11 09:47:09;Brand,Model;Sedan;black
30672/000004;8;2018-03-12 09:47:09;Brand,Model;Sedan;black
"""


@pytest.fixture
def folder(plant: Callable[..., Path]) -> Path:
    made = plant(
        "VERI-Wild",
        [f"images/{name}.jpg" for name in
         ("00001/000001", "00001/000002", "30672/000003", "30672/000004")],
    )  # fmt: skip
    (made / "train_test_split").mkdir()
    return made


def write(folder: Path, name: str, text: str) -> None:
    (folder / "train_test_split" / name).write_text(text)


def test_lists_with_cameras_of_their_own_file(folder: Path) -> None:
    write(folder, "vehicle_info.txt", INFO)
    write(folder, "train_list.txt", "00001/000001\n00001/000002\n")
    write(folder, "test_5000_query.txt", "30672/000003\n")
    write(folder, "test_5000.txt", "30672/000004\n")
    dataset = VeRiWild(test_size=5000)
    assert dataset.name == "VeRi-Wild-5000"
    train = dataset.load("train")
    assert [(r.pid, r.camid) for r in train] == [(1, 59), (1, 174)]
    assert Path(train[0].path) == folder / "images" / "00001" / "000001.jpg"
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(30672, 7)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(30672, 8)]
    assert dataset.published()["query"] == SplitCounts(5000, 5000)


def test_lists_with_cameras_in_the_lines(folder: Path) -> None:
    write(folder, "train_list_start0.txt", "00001/000001.jpg 0 59\n00001/000002.jpg 0 174\n")
    write(folder, "test_3000_id_query.txt", "30672/000003.jpg 30672 7\n")
    write(folder, "test_3000_id.txt", "30672/000004.jpg 30672 8\n")
    dataset = VeRiWild()
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(1, 59), (1, 174)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(30672, 7)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(30672, 8)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000001", "does not parse"),
        ("car/000001", "does not parse"),
        ("00001/000001 1 2 3", "does not parse"),
        ("00001/000001 1 x", "camera 'x'; expected a whole number"),
        ("../00001/000001 1 2", "leaves the folder"),
        ("/00001/000001 1 2", "leaves the folder"),
        ("00001/000009", r"00001/000009 is not in .*vehicle_info\.txt"),
    ],
)
def test_a_line_that_is_wrong(folder: Path, line: str, message: str) -> None:
    write(folder, "vehicle_info.txt", INFO)
    write(folder, "train_list.txt", f"00001/000001\n{line}\n")
    with pytest.raises(DataError, match=rf"train_list\.txt, line 2: .*{message}"):
        VeRiWild().load("train")


def test_what_is_missing(folder: Path) -> None:
    with pytest.raises(DataError, match=r"train_list\.txt: there is no such list"):
        VeRiWild().load("train")
    write(folder, "train_list.txt", "00001/000001\n")
    with pytest.raises(DataError, match=r"vehicle_info\.txt: there is no such list"):
        VeRiWild().load("train")
    write(folder, "train_list.txt", "00001/000007 1 2\n")
    with pytest.raises(DataError, match=r"000007\.jpg: there is no such image, but .*train_list"):
        VeRiWild().load("train")
    with pytest.raises(ValueError, match="test_size: expected 3000, 5000 or 10000, got 1"):
        VeRiWild(test_size=1)  # type: ignore[arg-type]
