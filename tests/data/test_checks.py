from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid.data.check_report import check_dataset, fix_list, load_splits, report_text
from reid.data.checks import KINDS, WRONG, check_images, check_labels, check_paths
from reid.data.datasets.base import ReIDDataset, Split, SplitCounts
from reid.structures import ImageRecord

TOOL = Path(__file__).parents[2] / "tools" / "check_data.py"


def picture(seed: int, size: tuple[int, int] = (64, 32)) -> np.ndarray:
    """Coloured pixels that differ from those of every other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


class Market(ReIDDataset):
    """The folders of Market-1501, with other published counts."""

    name = "Small"

    def load(self, split: Split) -> list[ImageRecord]:
        folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
        found = []
        for path in sorted((self.root / folder[split]).iterdir()):
            pid, camera = path.name.split("_")[:2]
            found.append(ImageRecord(str(path), int(pid), int(camera[1]) - 1))
        return found

    def published(self) -> dict[Split, SplitCounts]:
        return {"train": SplitCounts(3, 6, 2), "query": SplitCounts(2, 2, 1)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Training: three identities, two cameras; test: two others."""
    seen = [(pid, camera) for pid in (1, 2, 3) for camera in (1, 2)]
    names = {
        "bounding_box_train": [f"000{pid}_c{camera}s1_0.png" for pid, camera in seen],
        "query": ["0004_c1s1_0.png", "0005_c1s1_0.png"],
        "bounding_box_test": ["0004_c2s1_0.png", "0005_c2s1_0.png", "0000_c1s1_0.png"],
    }  # fmt: skip
    seed = 0
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            seed += 1
            Image.fromarray(picture(seed)).save(tmp_path / folder / name)
    return tmp_path


def checked(root: Path, **options: object) -> dict[str, object]:
    dataset = Market(str(root))
    return check_dataset(dataset, load_splits(dataset), **options)  # type: ignore[arg-type]


def found(report: dict[str, object], kind: str) -> list[str]:
    findings = report["findings"]
    assert isinstance(findings, list)
    return [Path(one["subject"]).name for one in findings if one["kind"] == kind]


def test_good_data_have_no_findings(root: Path) -> None:
    report = checked(root)
    assert report["ok"]
    assert report["findings"] == []
    counts = report["counts"]
    assert counts["train"]["images"] == {"found": 6, "published": 6, "verdict": "as published"}  # type: ignore[index]
    assert counts["gallery"]["identities"] == {"found": 3, "published": None, "verdict": None}  # type: ignore[index]
    assert report["images_by_camera"] == {
        "0": {"train": 3, "query": 2, "gallery": 1},
        "1": {"train": 3, "gallery": 2},
    }
    assert "Nothing wrong was found" in report_text(report)


def test_counts_that_differ_are_wrong(root: Path) -> None:
    (root / "bounding_box_train" / "0003_c1s1_0.png").unlink()
    report = checked(root, images=False)
    assert report["wrong"] == {"counts": 1}
    assert found(report, "one-camera") == ["3"]
    text = report_text(report)
    assert "WRONG, by -1" in text
    assert "were not read" in text


def test_broken_and_odd_images(root: Path) -> None:
    train = root / "bounding_box_train"
    whole = (train / "0001_c1s1_0.png").read_bytes()
    (train / "0001_c1s1_1.png").write_bytes(whole[: len(whole) // 2])
    (train / "0001_c1s1_2.png").write_bytes(b"")
    (train / "0001_c1s1_3.png").symlink_to(train / "gone.png")
    Image.fromarray(picture(50, (64, 15))).save(train / "0001_c1s1_4.png")
    Image.fromarray(picture(51)[:, :, 0]).save(train / "0001_c1s1_5.png")
    Image.new("RGB", (32, 64), (90, 30, 200)).save(train / "0001_c1s1_6.png")
    report = checked(root)
    assert found(report, "unreadable") == ["0001_c1s1_1.png", "0001_c1s1_3.png"]
    assert found(report, "zero-size") == ["0001_c1s1_2.png"]
    assert found(report, "tiny") == ["0001_c1s1_4.png"]
    assert found(report, "grey") == ["0001_c1s1_5.png"]
    assert found(report, "blank") == ["0001_c1s1_6.png"]
    assert report["wrong"] == {"counts": 1, "unreadable": 2, "zero-size": 1, "tiny": 1}
    left_out = [line for line in fix_list(report).splitlines() if not line.startswith("#")]
    assert left_out == [f"bounding_box_train/0001_c1s1_{i}.png" for i in (1, 3, 2, 4)]
    assert found(checked(root, min_side=15), "tiny") == []


def test_copies_and_which_to_leave_out(root: Path) -> None:
    train, query, gallery = (
        root / name for name in ("bounding_box_train", "query", "bounding_box_test")
    )
    shutil.copy(train / "0001_c1s1_0.png", train / "0001_c1s1_9.png")  # the same image twice
    shutil.copy(train / "0002_c1s1_0.png", train / "0003_c2s1_9.png")  # with two identities
    shutil.copy(query / "0004_c1s1_0.png", train / "0001_c2s1_9.png")  # in training and test
    shutil.copy(query / "0005_c1s1_0.png", gallery / "0005_c1s1_0.png")  # removed by the protocol
    shutil.copy(query / "0005_c1s1_0.png", gallery / "0005_c2s1_9.png")  # a match with itself
    report = checked(root)
    findings = report["findings"]
    assert isinstance(findings, list)
    left_out = {
        str(Path(one["subject"]).relative_to(root)): one["leave_out"]
        for one in findings
        if one["kind"] == "duplicate"
    }
    assert left_out == {
        "bounding_box_train/0001_c1s1_9.png": True,
        "bounding_box_train/0002_c1s1_0.png": True,
        "bounding_box_train/0003_c2s1_9.png": True,
        "bounding_box_train/0001_c2s1_9.png": True,
        "query/0005_c1s1_0.png": True,
        "bounding_box_test/0005_c1s1_0.png": True,
        "bounding_box_test/0005_c2s1_9.png": True,
    }


def test_a_query_in_the_gallery_is_no_fault(root: Path) -> None:
    shutil.copy(root / "query" / "0005_c1s1_0.png", root / "bounding_box_test" / "0005_c1s1_0.png")
    assert checked(root)["ok"]


def test_one_file_listed_twice(root: Path) -> None:
    def listed(*rows: tuple[Split, str, int, int]) -> list[tuple[Split, str, str, bool]]:
        """The findings with images read; checks that the paths alone give the same."""
        splits: dict[Split, list[ImageRecord]] = {"train": [], "query": [], "gallery": []}
        for split, name, pid, camid in rows:
            path = root / "bounding_box_train" / f"000{name}_c1s1_0.png"
            splits[split].append(ImageRecord(str(path), pid, camid))
        found = check_images(splits)
        assert check_paths(splits) == found
        return [
            (one.split, Path(one.subject).name[3], one.detail.split("/")[0], one.leave_out)
            for one in found
        ]

    assert listed(("train", "1", 0, 0), ("train", "1", 0, 0), ("train", "2", 5, 0)) == [
        ("train", "1", "is listed again", False)
    ]
    assert listed(("train", "1", 0, 0), ("train", "1", 1, 0)) == [
        ("train", "1", "identity 0, camera 0; as ", True),
        ("train", "1", "identity 1, camera 0; as ", True),
    ]
    assert listed(("query", "1", 0, -1), ("gallery", "1", 0, -1)) == [
        ("gallery", "1", "is the query ", False)
    ]
    assert listed(("query", "1", 0, 0), ("gallery", "1", 0, 0)) == [
        ("gallery", "1", "is the query ", False)
    ]
    # labels in training do not make those of the test doubtful
    assert listed(("query", "1", 0, 0), ("gallery", "1", 0, 0), ("train", "1", 2, 0)) == [
        ("train", "1", "in query too: ", True),
        ("gallery", "1", "is the query ", False),
    ]


def test_near_duplicates(root: Path) -> None:
    # saved again, a little brighter, as another identity
    pixels = np.clip(picture(1).astype(int) + 2, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(root / "bounding_box_train" / "0002_c1s1_9.jpg", quality=90)
    report = checked(root)
    assert found(report, "near-duplicate") == ["0002_c1s1_9.jpg"]
    assert "of identity 1 and not 2" in report_text(report)
    assert report["wrong"] == {"counts": 1}


def test_labels_that_cannot_be_right() -> None:
    def record(name: str, pid: int, camid: int) -> ImageRecord:
        return ImageRecord(name, pid, camid)

    splits: dict[Split, list[ImageRecord]] = {
        "train": [record("a", 1, 0), record("b", 1, 1), record("c", 2, 0), record("d", 3, -1)],
        "query": [
            record("only its own camera", 4, 0),
            record("another camera", 5, 0),
            record("no camera known", 4, -1),
            record("nobody", 9, 0),
            record("no identity", -1, 0),
            record("of training", 1, 0),
        ],
        "gallery": [
            record("e", 4, 0), record("f", 5, 1), record("g", 1, 1), record("h", -1, 1),
        ],
    }  # fmt: skip
    findings = check_labels(splits)
    assert check_labels(splits, same_numbers=False) == findings[:-1]
    assert [(one.kind, one.subject) for one in findings] == [
        ("no-match", "only its own camera"),
        ("no-match", "nobody"),
        ("no-match", "no identity"),
        ("one-camera", "2"),
        ("shared-identity", "1"),
    ]


def test_the_same_for_any_number_of_threads(root: Path) -> None:
    dataset = Market(str(root))
    splits = load_splits(dataset)
    done: list[int] = []
    one = check_images(splits, progress=done.append)
    assert sum(done) == 11
    assert one == check_images(splits, workers=4)
    assert set(WRONG) < set(KINDS)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(stop.value.code or 0)


def test_the_list_of_the_tool_mends_the_data(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [root / name for name in ("bounding_box_train", "query", "bounding_box_test")]
    for folder in folders:
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{path.stem}{number}.png")
    (folders[0] / "0001_c1s1_000.png").write_bytes(b"")
    monkeypatch.setenv("REID_DATASETS", str(root))
    pattern = r"(?P<split>\w+)/(?P<pid>\d+)_c(?P<camid>\d)"
    own = ("Pattern", "PATH", ".", "PATTERN", pattern)
    lists = tmp_path / "lists"
    lists.mkdir()
    for folder, split in zip(folders, ("train", "query", "gallery"), strict=True):
        folder.rename(root / split)
    code = run(monkeypatch, *own, "--fix-list", lists / "out.txt", "--json", lists / "all.json")
    text = capsys.readouterr().out
    assert code == 1, text
    assert "1 images to leave out" in text
    assert "WRONG  zero-size: 1" in text
    assert json.loads((lists / "all.json").read_text())[0]["wrong"] == {"zero-size": 1}
    assert run(monkeypatch, *own, "LEAVE_OUT", lists / "out.txt") == 0
    assert "Nothing wrong was found" in capsys.readouterr().out


def test_a_list_of_test_images_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root))
    lines = ["path,pid,camid,split", "query/0004_c1s1_0.png,4,0,query"]
    lines += ["bounding_box_test/0004_c2s1_0.png,4,1,gallery"]
    (root / "list.csv").write_text("\n".join(lines))
    assert run(monkeypatch, "CSV", "PATH", "list.csv") == 0
    text = capsys.readouterr().out
    assert "query" in text
    assert "train" not in text
    (root / "list.csv").write_text("\n".join(lines[:2]))
    assert run(monkeypatch, "CSV", "PATH", "list.csv") == 1
    assert "has neither training images nor query and gallery" in capsys.readouterr().err


def test_the_report_starts_with_the_version_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root))
    (root / "notes.txt").touch()
    pattern = r"(?P<pid>\d+)_(?P<camid>c\d)"
    assert run(monkeypatch, "Pattern", "PATH", ".", "PATTERN", pattern, "--no-images") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"WARNING: {root}: passed over files that are no images: 1 (.txt 1)"
    assert lines[1] == "Pattern: PATTERN matches 11 of 11 images, for example"
    assert lines[4].split() == ["'bounding_box_test/0000_c1s1_0.png'", "0", "0", "train"]
    assert "cameras: 0 = 'c1', 1 = 'c2'" in lines
    assert lines.index("") < lines.index(f"Pattern below {root}")
    assert run(monkeypatch, "Folder", "PATH", ".", "--no-images") == 0
    assert "cameras 0 = 'bounding_box_test', 1 = " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are Unicode there")
def test_names_that_are_not_utf8(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "query" / os.fsdecode(b"lat-\xe9.png")).touch()
    monkeypatch.setenv("REID_DATASETS", str(root))
    own = ("Folder", "PATH", ".", "--workers", 1)
    written = root / "out.txt", root / "all.json"
    assert run(monkeypatch, *own, "--fix-list", written[0], "--json", written[1]) == 1
    assert r"lat-\udce9.png: a file of 0 bytes" in capsys.readouterr().out
    assert b"\nquery/lat-\xe9.png\n" in written[0].read_bytes()
    (finding,) = json.loads(written[1].read_text())[0]["findings"]
    assert os.fsencode(finding["subject"]).endswith(b"query/lat-\xe9.png")
    assert run(monkeypatch, *own, "LEAVE_OUT", written[0]) == 0
    assert "train: 1 of 12 images left out" in capsys.readouterr().out


def test_wrong_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    assert run(monkeypatch) == 2
    assert "expected the name of a data set" in capsys.readouterr().err
    assert run(monkeypatch, "Market1051") == 2
    assert "did you mean 'Market1501'" in capsys.readouterr().err
    assert run(monkeypatch, "Market1501", "ROOT") == 2
    assert "'ROOT' has no value" in capsys.readouterr().err
    assert run(monkeypatch, "Market1501") == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "1.png").touch()
    own = ("Folder", "PATH", ".", "--no-images")
    assert run(monkeypatch, *own, "--json", tmp_path / "1.png" / "x.json") == 2
    assert "OutputError: " in capsys.readouterr().err


@pytest.mark.parametrize(("camid", "wrong"), [("", 1), ("0", 0)])
def test_paths_alone_tell_that_query_and_gallery_share_images(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    camid: str,
    wrong: int,
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root))
    query, other = "query/0004_c1s1_0.png", "bounding_box_test/0004_c2s1_0.png"
    other_camid = camid and "1"
    rows = [f"{query},4,{camid},query", f"{query},4,{camid},gallery",
            f"{other},4,{other_camid},gallery"]  # fmt: skip
    (root / "list.csv").write_text("\n".join(["path,pid,camid,split", *rows]))
    monkeypatch.setattr("reid.data.checks.read_image_noting", None)
    assert run(monkeypatch, "CSV", "PATH", "list.csv", "--no-images") == wrong
    out = capsys.readouterr().out
    assert ("WRONG  duplicate: 1" in out) == bool(wrong)
    assert ("note  shared-image: 1 (a query that lies in the gallery too" in out) != bool(wrong)
    assert f"is the query {root / query}" in out


def test_a_damaged_picture_is_noted(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = root / "bounding_box_train" / "0001_c1s1_9.jpg"
    Image.fromarray(picture(60)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\0\0\x12\x34" + content[-2:])
    report = checked(root, workers=4)
    assert found(report, "damaged") == [path.name]
    assert "Corrupt JPEG data" in report_text(report)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_pipes_and_folders_are_unreadable(root: Path) -> None:
    os.mkfifo(root / "bounding_box_train" / "0001_c1s1_8.jpg")
    (root / "bounding_box_train" / "0001_c1s1_9.jpg").symlink_to("/dev/zero")
    report = checked(root)
    assert found(report, "unreadable") == ["0001_c1s1_8.jpg", "0001_c1s1_9.jpg"]
    assert "is a pipe, expected a regular file" in report_text(report)


@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_lists_to_leave_out_are_written_through_links(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root))
    (root / "link.txt").symlink_to(root / "far.txt")
    for output in (root / "link.txt", Path("/dev/null")):
        arguments = ("Folder", "PATH", "query", "--fix-list", str(output))
        assert run(monkeypatch, *arguments) == 0
    assert (root / "link.txt").is_symlink()
    assert (root / "far.txt").read_text().startswith("# query: images to leave out")
    assert Path("/dev/null").is_char_device()


def test_control_characters_in_names_are_escaped(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root))
    (root / "own" / "door").mkdir(parents=True)
    for name in ("\x1b[2J1.png", "2.png"):
        (root / "own" / "door" / name).write_bytes(b"no picture")
    assert run(monkeypatch, "Folder", "PATH", "own") == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"door/\x1b[2J1.png: " in out


def test_missing_splits_are_reported(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    market = root / "Market-1501-v15.09.15"
    market.mkdir()
    (root / "bounding_box_train").rename(market / "bounding_box_train")
    (root / "query").rename(market / "query")  # useless without the gallery
    monkeypatch.setenv("REID_DATASETS", str(root))
    assert run(monkeypatch, "Market1501", "--json", root / "report.json") == 1
    text = capsys.readouterr().out
    gallery = market / "bounding_box_test"
    assert f"NOT THERE  what follows is about train alone\n  gallery  {gallery}\n" in text
    assert re.search(r"train +images +6 +12,936 +WRONG, by -12,930", text)
    (report,) = json.loads((root / "report.json").read_text())
    assert report["missing"] == {"gallery": str(gallery)}
    assert report["wrong"] == {"counts": 3}
    assert report["counts"].keys() == {"train"}

    validation = ("VALIDATION", "{IDENTITIES: 1}")
    assert (
        run(monkeypatch, "Market1501", *validation) == 0
    )  # published counts are those of the whole set
    text = capsys.readouterr().out
    assert "NOT THERE" not in text
    assert re.search(r"query +images +1 +-", text)

    shutil.rmtree(market / "bounding_box_train")
    assert run(monkeypatch, "Market1501") == 1
    assert f"there is no train ({market / 'bounding_box_train'}) and no gallery" in (
        capsys.readouterr().err
    )
