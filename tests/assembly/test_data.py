"""Datasets of a config: joined ones, left-out images, and the cameras that the model sees."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from reid.assembly.cameras import Camera, match_camera, renumber_cameras, training_cameras
from reid.assembly.data import TrainImages, build_dataset, build_datasets, spec_of_words
from reid.assembly.images import build_test_sets, build_train_images
from reid.assembly.network import known_cameras
from reid.config import load_config
from reid.data.datasets import CSV, Folder, Pattern, ReIDDataset, Split, SyntheticPersons
from reid.registry import ConfigError
from reid.structures import DataError, ImageRecord
from reid.workflows.evaluate import evaluate as run_test
from reid.workflows.train import train

ROOT = Path(__file__).parents[2]
SETTINGS = """
INPUT: {SIZE: [32, 16]}
DATALOADER: {NUM_WORKERS: 0, SAMPLER: {NAME: PKSampler, BATCH_SIZE: 4, IMAGES_PER_IDENTITY: 2}}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION: [Triplet]
SOLVER: {OPTIMIZER: Adam, MAX_EPOCHS: 1, WARMUP_EPOCHS: 0, MILESTONES: []}
TEST: {EVAL_PERIOD: 1, EVALUATOR: {NAME: Market1501Evaluator, RANKS: [1]}}
DEVICE: cpu
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    (tmp_path / "config.yaml").write_text(SETTINGS)
    return tmp_path


def write(root: Path, name: str, lines: list[str]) -> None:
    """A CSV dataset with a picture of another colour for each line."""
    folder = root / name
    folder.mkdir(parents=True)
    rows = ["path,pid,camid,split"]
    for number, line in enumerate(lines):
        Image.new("RGB", (8, 16), (number * 40 % 256, number * 70 % 256, 90)).save(
            folder / f"{number}.png"
        )
        rows.append(f"{number}.png,{line}")
    (folder / "list.csv").write_text("\n".join(rows))


def run(root: Path, *pairs: str) -> dict[str, Any]:
    train(load_config(root / "config.yaml", ["OUTPUT_DIR", str(root / "out"), *pairs]))
    results = root / "out" / "results.json"
    return json.loads(results.read_text()) if results.exists() else {}


def spec(name: str) -> dict[str, Any]:
    return {"name": "CSV", "path": f"{name}/list.csv"}


def test_joined_sets_train_and_several_are_tested(root: Path) -> None:
    write(root, "a", ["3,0,train", "3,2,train", "8,0,train", "1,0,query", "1,2,gallery"])
    write(root, "b", ["3,0,train", "3,1,train", ",,train", "1,0,query", "1,1,gallery"])
    joined = "[{NAME: CSV, PATH: a/list.csv}, {NAME: CSV, PATH: b/list.csv}]"
    results = run(root, "DATASETS.TRAIN", joined)
    assert [entry["test_set"] for entry in results["final"]] == ["a", "b"]
    log = (root / "out" / "log.txt").read_text()
    assert re.search(r"a \+ b +train +6 +3 +4\n", log)
    assert re.search(r"\nb +3 +2 to 2 +2 to 3\n", log)
    config = load_config(root / "out" / "config.yaml")
    assert config.datasets.train == [spec("a"), spec("b")]
    records = build_train_images(config).load()
    assert [(r.pid, r.camid, r.source) for r in records] == [
        (0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (2, 2, "b"), (2, 3, "b"), (-1, -1, "b")]  # fmt: skip


def test_test_sets_of_one_name_are_kept_apart(root: Path) -> None:
    write(root, "a", ["3,0,train", "4,2,train", "1,0,query", "1,2,gallery", "2,2,gallery"])
    results = run(root, "DATASETS.TRAIN", "{NAME: CSV, PATH: a/list.csv}")
    weights = str(root / "out" / "model_final.safetensors")
    tests = "[{NAME: CSV, PATH: a/list.csv}, {NAME: CSV, PATH: a/list.csv}]"
    pairs = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", tests, "OUTPUT_DIR", str(root / "eval")]
    found = run_test(load_config(root / "out" / "config.yaml", pairs))
    assert found == {"a": results["final"][0]["numbers"], "a (2)": found["a"]}
    written = json.loads((root / "eval" / "results_eval_only.json").read_text())
    assert {"weights", "a", "a (2)", "provenance"} == written.keys()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0,0,train"], None),  # one image
        (["0,0,train", "0,0,train", "0,0,train"], None),  # one identity of one camera
        (["7,3,train", "7,9,train", "900000000000,3,train"], None),  # gaps
        (["0,0,train", "0,1,query", "0,2,gallery"], None),
        (["0,0,train", "0,1,query", "0,1,gallery"], "no query has a match"),  # one camera
        (["0,5000,train", "1,0,train"], "a camera has the number 5,000, but there are only 2"),
    ],
)
def test_tiny_sets_work_or_say_why_not(root: Path, lines: list[str], message: str | None) -> None:
    write(root, "a", lines)
    pairs = ("DATASETS.TRAIN", "{NAME: CSV, PATH: a/list.csv}")
    if message is None:
        results = run(root, *pairs)
        assert bool(results) == any("query" in line for line in lines)
    else:
        with pytest.raises((ValueError, DataError), match=f"(?i){message}"):
            run(root, *pairs)


def test_left_out_images(root: Path) -> None:
    write(root, "a", ["0,0,train", "1,0,train", "2,0,train"])
    (root / "fix.txt").write_text("a/1.png\n")
    dataset = build_dataset({**spec("a"), "leave_out": str(root / "fix.txt")}, "datasets.train")
    assert [record.pid for record in dataset.load("train")] == [0, 2]
    with pytest.raises(ConfigError, match=r"datasets\.train\.leave_out: .*gone: there is no such"):
        build_dataset({**spec("a"), "leave_out": str(root / "gone")}, "datasets.train")
    with pytest.raises(ConfigError, match=r"datasets\.train\.leave_out: expected a file, got 3"):
        build_dataset({**spec("a"), "leave_out": 3}, "datasets.train")


def plant_market(root: Path) -> None:
    """The training part of Market-1501 with five identities, each in one or two cameras."""
    folder = root / "Market-1501-v15.09.15" / "bounding_box_train"
    folder.mkdir(parents=True)
    for number in range(18):
        pid, camera = number // 4, 1 + number % 2 * (number < 16)
        Image.new("RGB", (8, 16), (number * 40 % 256, number * 70 % 256, 90)).save(
            folder / f"{pid:04d}_c{camera}s1_{number:06d}_00.jpg"
        )


def test_market_trains_and_validates_without_its_test(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_market(root)
    assert not run(root, "DATASETS.TRAIN", "Market1501")
    log = (root / "out" / "log.txt").read_text()
    market = root / "Market-1501-v15.09.15"
    assert (
        f"Market1501 has no query ({market / 'query'}) and no gallery "
        f"({market / 'bounding_box_test'}), so it is not evaluated"
    ) in log
    assert "nothing will be evaluated" in log

    pairs = ("DATASETS.TRAIN", "{NAME: Market1501, VALIDATION: {IDENTITIES: 0.5, SEED: 3}}")
    results = run(root, *pairs, "OUTPUT_DIR", str(root / "validated"), "SOLVER.MAX_EPOCHS", "2")
    results = json.loads((root / "validated" / "results.json").read_text())
    name = "Market1501-validation-0.5-seed3"
    assert [entry["test_set"] for entry in results["history"]] == [name, name]
    assert results["best_chosen_on_test_set"] is False
    assert results["best_chosen_by"] == f"mAP on the validation split {name}"
    log = (root / "validated" / "log.txt").read_text()
    assert "2 of 5 identities are set aside for validation (seed 3): 4 queries, 4 gallery" in log
    assert "costs training 8 of its 18 images (44.4 %)" in log
    assert "has no query" not in log
    assert re.search(rf"{name} +train +10 +3 +2\n{name} +query +4 +2", log)


def test_a_validation_split_beside_a_test_set(root: Path) -> None:
    plant_market(root)
    write(root, "a", ["3,0,train", "1,0,query", "1,2,gallery"])
    split = "{NAME: Market1501, VALIDATION: {IDENTITIES: 2}}"
    tests = f"[{split}, {{NAME: CSV, PATH: a/list.csv}}]"
    results = run(root, "DATASETS.TRAIN", split, "DATASETS.TEST", tests)
    assert [entry.get("is_validation", False) for entry in results["final"]] == [True, False]
    assert results["best_chosen_on_test_set"] is False

    for train_set in ("Market1501", f"[{split}, Market1501]", split.replace("2}", "3}")):
        config = load_config(root / "config.yaml", ["DATASETS.TRAIN", train_set])
        if train_set.startswith("{"):  # the split of three identities includes both
            assert len(build_test_sets(config)) == 1
        config.datasets.test = [yaml.safe_load(split.lower().replace("market", "Market"))]
        if train_set.startswith("{"):
            assert len(build_test_sets(config)) == 1
        else:
            with pytest.raises(
                ConfigError, match=r"datasets\.train: training uses 8 of the 8 images of Market150"
            ):
                build_test_sets(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities": "many"}, r"datasets\.train\.validation\.identities: expected int | float"),
        (
            {"identities": 1.5},
            r"datasets\.train\.validation\.identities: expected a number of ident",
        ),
        ({"identities": True}, r"validation\.identities: expected"),
        (
            {"identities": 2, "seed": 0.5},
            r"datasets\.train\.validation\.seed: expected int, got 0\.5",
        ),
        ({"seed": 1}, r"datasets\.train\.validation: expected {IDENTITIES: a number or a share}"),
        ({"identities": 2, "sed": 1}, r"datasets\.train\.validation: expected .* got .*'sed': 1"),
        (0.2, r"datasets\.train\.validation: expected .* got 0\.2"),
    ],
)
def test_wrong_options_of_a_validation_split(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataset({"name": "Market1501", "validation": options}, "datasets.train")


def test_specs() -> None:
    for nothing in ({}, [], "", None):
        with pytest.raises(ConfigError, match=r"datasets\.train: expected a dataset"):
            build_datasets(nothing, "datasets.train")
    with pytest.raises(ConfigError, match=r"datasets\.train\[1\]\.name: 'Nobody' is not registere"):
        build_datasets(["Market1501", "Nobody"], "datasets.train")
    for wrong in ("[]", "3"):
        with pytest.raises(ConfigError, match=r"datasets\.train: expected a dataset, or a list"):
            load_config(None, ["DATASETS.TRAIN", wrong])
    assert load_config(None, ["DATASETS.TRAIN", "Market1501"]).datasets.train == "Market1501"


def test_a_command_line_is_read_like_a_config() -> None:
    splits = "{QUERY: probe}"
    spec = spec_of_words(["Pattern", "PATH", "own", "SPLITS", splits])
    train = f"{{NAME: Pattern, PATH: own, SPLITS: {splits}}}"
    assert spec == load_config(None, ["DATASETS.TRAIN", train]).datasets.train
    assert spec["splits"] == {"query": "probe"}


def test_the_model_sees_the_cameras_it_knows(root: Path) -> None:
    for name in "ab":
        write(root, name, ["0,0,train", "0,3,train", "1,3,query", "1,4,gallery"])
    write(root, "c", ["1,0,query", "1,3,gallery"])
    a, b, c = (CSV(f"{name}/list.csv") for name in "abc")
    again = CSV("b/list.csv")

    def told(train: TrainImages, dataset: CSV) -> list[int]:
        records = [ImageRecord("x", 0, camid) for camid in (0, 3, 4, -1)]
        cameras = training_cameras(train)
        return [record.camid for record in renumber_cameras(cameras, records, dataset)]

    assert told(TrainImages([a]), a) == [0, 3, -1, -1]
    assert told(TrainImages([b]), again) == [0, 3, -1, -1]
    assert told(TrainImages([a]), c) == [-1, -1, -1, -1]
    assert told(TrainImages([a, b]), a) == [0, 1, -1, -1]
    assert told(TrainImages([a, b]), again) == [2, 3, -1, -1]
    assert told(TrainImages([a, b]), c) == [-1, -1, -1, -1]
    assert told(TrainImages([b, again]), again) == [-1, -1, -1, -1]  # one of the two


def test_a_site_is_recognised_by_its_folder_not_its_name(root: Path) -> None:
    for name in ("here/crops", "there/crops"):
        write(root, name, ["0,0,train", "0,3,train"])
    (root / "link").symlink_to(root / "here" / "crops")
    pattern = r"(?P<pid>\d)"
    here = [
        CSV("here/crops/list.csv"),
        CSV("link/list.csv"),
        Folder("here/crops"),
        Folder("crops/", root=str(root / "here")),
        Pattern("here/crops", pattern),
    ]
    (root / "none.txt").touch()
    left_out = {**spec("here/crops"), "leave_out": str(root / "none.txt")}
    here.append(build_dataset(left_out, "datasets.test"))
    there = [CSV("there/crops/list.csv"), Folder("there/crops"), Pattern("there/crops", pattern)]
    for own in here:
        learned = [Camera(own.site, 3)]
        assert all(match_camera(learned, one.site, 3, "") == 0 for one in here)
        assert all(match_camera(learned, one.site, 3, "") is None for one in there)
    drawn, again, other = SyntheticPersons(), SyntheticPersons(), SyntheticPersons(seed=1)
    assert drawn.site == again.site != other.site


def test_cameras_with_names_are_recognised_by_them(root: Path) -> None:
    for path in ("hall/0.jpg", "yard/0.jpg", "door/0.jpg", "door/1.jpg"):
        (root / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "own" / path).touch()
    train, every = Pattern("own", "(?P<camid>hall|yard)/0", "skip"), Folder("own")
    test = Pattern("own", "(?P<camid>door|yard)/(?P<pid>.)", "skip")
    write(root, "other", ["0,0,train", "0,3,train"])
    other = CSV("other/list.csv")
    for dataset in (train, every, test):
        dataset.load("train")
    assert (train.cameras, test.cameras) == (("hall", "yard"), ("door", "yard"))

    def told(images: TrainImages, dataset: ReIDDataset) -> list[int]:
        records = [ImageRecord("x", 0, camid) for camid in (0, 1, -1)]
        cameras = training_cameras(images)
        return [record.camid for record in renumber_cameras(cameras, records, dataset)]

    assert told(TrainImages([train]), train) == [0, 1, -1]
    assert told(TrainImages([train]), test) == [-1, 1, -1]
    assert told(TrainImages([every]), test) == [0, 2, -1]
    assert told(TrainImages([other, every]), test) == [2, 4, -1]


def test_foreign_cameras_are_unknown_to_the_model_but_not_to_the_evaluator(
    root: Path,
) -> None:
    write(root, "a", ["0,0,train", "0,3,train"])
    write(root, "c", ["1,0,query", "1,3,gallery"])
    pairs = ["DATASETS.TRAIN", "{NAME: CSV, PATH: a/list.csv}",
             "DATASETS.TEST", "[{NAME: CSV, PATH: c/list.csv}]"]  # fmt: skip
    for backbone, told in (("{NAME: TimmBackbone, MODEL: test_resnet}", [0, 3]),
                           ("{NAME: ViT}", [-1, -1])):  # fmt: skip
        config = load_config(root / "config.yaml", [*pairs, "MODEL.BACKBONE", backbone])
        train = build_train_images(config)
        (test_set,) = build_test_sets(config, train, known_cameras(config, train))
        (batch,) = test_set.images.loader
        assert batch.camid.tolist() == told
        assert [r.camid for r in (*test_set.query, *test_set.gallery)] == [0, 3]


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Omniglot images, unpacked."""
    archive = Path(os.environ.get("REID_DATA", ROOT.parent / "shared" / "data")) / "omniglot.zip"
    if not archive.is_file():
        pytest.skip(f"no real images: {archive} does not exist (set REID_DATA to its folder)")
    root = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(archive) as files:
        files.extractall(root)
    return root


def test_real_images_through_folder_pattern_and_csv(omniglot: Path) -> None:
    def ids(records: list[ImageRecord]) -> list[tuple[int, int]]:
        return sorted((record.pid, record.camid) for record in records)

    def dataset(**options: Any) -> ReIDDataset:
        return build_dataset({**options, "root": str(omniglot)}, "datasets.train")

    splits: tuple[Split, ...] = ("train", "query", "gallery")
    csv = dataset(name="CSV", path="omniglot/annotations.csv")
    listed = {split: csv.load(split) for split in splits}
    assert [len(records) for records in listed.values()] == [2720, 530, 1590]
    moved = omniglot / "by camera"
    for camid in range(20):
        for split in splits:
            (moved / f"drawer {camid + 1}" / split).mkdir(parents=True)
    for split, records in listed.items():
        for record in records:
            name = f"{record.pid:04d}_{Path(record.path).name}"
            os.rename(record.path, f"{moved}/drawer {record.camid + 1}/{split}/{name}")  # noqa: PTH104
    pattern = r"^drawer (?P<camid>\d+)/(?P<split>\w+)/(?P<pid>\d+)_"
    named = dataset(name="Pattern", path="by camera", pattern=pattern)
    assert named.has_test()
    for split in splits:
        assert ids(named.load(split)) == ids(listed[split])
    folder = dataset(name="Folder", path="by camera").load("train")
    everyone = [record.camid for records in listed.values() for record in records]
    assert sorted(record.camid for record in folder) == sorted(everyone)
    with Image.open(folder[0].path) as picture:
        assert picture.size == (105, 105)


def test_snippets_of_the_page_on_datasets(root: Path) -> None:
    page = (ROOT / "datasets" / "README.md").read_text("utf-8")
    snippets = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert len(snippets) == 7  # all of the page
    (root / "wrong.txt").touch()
    used = set()
    for snippet in snippets:
        (root / "snippet.yaml").write_text(yaml.safe_dump({**yaml.safe_load(SETTINGS), **snippet}))
        config = load_config(root / "snippet.yaml")
        specs = config.datasets.train
        for one in [*(specs if isinstance(specs, list) else [specs]), *config.datasets.test]:
            if isinstance(one, dict) and "leave_out" in one:
                one["leave_out"] = str(root / one["leave_out"])
            used.add(type(build_dataset(one, "datasets")).__name__)
    assert {"CSV", "Folder", "Pattern", "LeaveOut", "ValidationSplit"} <= used
