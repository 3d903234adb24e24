from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reid.evaluation import ranking
from reid.evaluation.feature_files import load_features
from reid.evaluation.ranking_kernels import Distances
from reid.evaluation.report import evaluate_features, evaluate_file, report_text
from reid.evaluation.watchers import CameraPairRanks
from reid.registry import ConfigError
from reid.structures import DataError

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


def arrays(count: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pids = np.arange(count) % 10
    features = rng.normal(size=(10, 8))[pids] + 0.5 * rng.normal(size=(count, 8))
    camids = np.arange(count) // 10 % 3
    split = {"query": slice(0, 20), "gallery": slice(20, None)}
    return {
        f"{name}_{key}": values[rows]
        for name, rows in split.items()
        for key, values in (("feat", 7 * features), ("pids", pids), ("camids", camids))
    }


def write_csv(path: Path, found: dict[str, np.ndarray]) -> None:
    lines = ["path,pid,camid,split", "0.jpg,,,train"]
    for split in ("query", "gallery"):
        for pid, camid in zip(found[f"{split}_pids"], found[f"{split}_camids"], strict=True):
            lines.append(f"{len(lines)}.jpg,{pid},{camid},{split}")
    path.write_text("\n".join(lines))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(stop.value.code or 0)


def test_features_with_ids_and_features_with_a_list_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = arrays()
    np.savez(tmp_path / "all.npz", **found)
    features = np.concatenate([np.zeros((1, 8)), found["query_feat"], found["gallery_feat"]])
    np.savez(tmp_path / "features.npz", features=features)
    write_csv(tmp_path / "list.csv", found)
    assert run(monkeypatch, tmp_path / "all.npz", "--output", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    for words in (
        "mAP", "Rank-20", "TPR@FPR 0.001", "camera 2",
        "Hardest queries (AP step, Euclidean distance)",
        "Queries: 20, with a match 20, ignored 0\nGallery: 40, junk 0, distractors 0",
    ):  # fmt: skip
        assert words in text
    assert (
        run(monkeypatch, tmp_path / "features.npz", "--csv", tmp_path / "list.csv",
            "--output", tmp_path / "b.json") == 0
    )  # fmt: skip
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    paths = other.pop("hardest_query_paths")
    assert one == other
    # images are named by their line after the header, the first is one for training
    hardest = [f"{row + 2}.jpg" for row in one["hardest_queries"]]
    assert [Path(path).name for path in paths] == hardest
    assert hardest[0] in capsys.readouterr().out
    assert len(one["per_query_AP"]) == 20
    assert one["numbers"]["mAP"] == pytest.approx(np.mean(one["per_query_AP"]))
    assert one["camera_pairs"]["mAP"][0][0] is None


def test_a_list_may_name_images_anywhere(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.eye(3))
    rows = "/a/1.jpg,1,0,query\n../2.jpg,2,0,query\n3.jpg,1,1,gallery\n"
    (tmp_path / "list.csv").write_text(f"path,pid,camid,split\n{rows}")
    loaded = load_features(tmp_path / "f.npz", tmp_path / "list.csv")
    assert loaded.query_paths == ["/a/1.jpg", f"{tmp_path}/../2.jpg"]
    assert loaded.gallery_paths == [f"{tmp_path}/3.jpg"]


def test_options_reach_the_evaluator(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", **arrays())
    sets = load_features(tmp_path / "all.npz")
    done: list[tuple[int, int]] = []
    plain = evaluate_features(*sets, progress=lambda *counts: done.append(counts))
    assert done == [(10, 20), (20, 20)]
    trapezoid = evaluate_features(*sets, options=["AP", "trapezoid"])
    assert trapezoid["numbers"]["mAP"] < plain["numbers"]["mAP"]
    assert trapezoid["TPR@FPR"] == plain["TPR@FPR"]
    with pytest.raises(ConfigError, match=r"evaluator\.app: .*did you mean 'ap'"):
        evaluate_features(*sets, options=["APP", "step"])
    with pytest.raises(ConfigError, match="expected KEY VALUE pairs"):
        evaluate_features(*sets, options=["AP"])


@pytest.mark.parametrize(
    ("options", "ap", "ranked_by"),
    [
        (["AP", "trapezoid"], "trapezoid", "Euclidean distance"),
        (
            ["RERANKING", "true", "K1", "8", "K2", "3"],
            "step",
            "k-reciprocal re-ranking (k1 8, k2 3, original weight 0.3)",
        ),
    ],
)
def test_all_tables_use_the_ranking_of_the_numbers(
    tmp_path: Path, options: list[str], ap: str, ranked_by: str
) -> None:
    np.savez(tmp_path / "all.npz", **arrays())
    sets = load_features(tmp_path / "all.npz")
    plain, found = evaluate_features(*sets), evaluate_features(*sets, options=options)
    assert (found["ap"], found["ranked_by"]) == (ap, ranked_by)
    assert found["numbers"]["mAP"] == pytest.approx(np.mean(found["per_query_AP"]))
    assert found["per_query_AP"] != plain["per_query_AP"]
    assert found["camera_pairs"]["mAP"] != plain["camera_pairs"]["mAP"]
    worst = [found["per_query_AP"][row] for row in found["hardest_queries"]]
    assert worst == sorted(found["per_query_AP"])[:10]
    text = report_text(found)
    assert f"Hardest queries (AP {ap}, {ranked_by})" in text
    assert f"mAP from the row's camera to the column's (AP {ap}, {ranked_by})" in text


def test_queries_without_a_match_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 02: ten queries, of which one has a match in another camera."""
    found = arrays()
    found["query_pids"] = np.arange(20) + 1
    found["query_camids"] = np.zeros(20, int)
    found["gallery_pids"] = np.where(np.arange(40) < 20, np.arange(40) + 1, 300)
    found["gallery_pids"][39] = -1
    found["gallery_camids"] = np.zeros(40, int)
    found["gallery_camids"][4] = 1
    np.savez(tmp_path / "all.npz", **found)
    assert run(monkeypatch, tmp_path / "all.npz", "--output", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    assert "19 of 20 queries have no match in another camera and count nowhere" in text
    assert "Queries: 20, with a match 1, ignored 19" in text
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["counts"] == {
        "queries": {"all": 20, "with_match": 1, "ignored": 19},
        "gallery": {"all": 40, "junk": 1, "distractors": 19},
    }
    found["gallery_camids"][4] = 0
    np.savez(tmp_path / "none.npz", **found)
    assert run(monkeypatch, tmp_path / "none.npz") == 2
    assert "all images are of camera 0, and an image of the query's own" in capsys.readouterr().err


def test_a_query_in_the_gallery_is_recognised_by_its_path(tmp_path: Path) -> None:
    """Cameras are unknown: without paths the query itself would be a perfect match."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 4))
    np.savez(tmp_path / "f.npz", features=np.concatenate([features[:3], features]))
    rows = [f"{i}.jpg,{i % 3},,query" for i in range(3)]
    rows += [f"{i}.jpg,{i % 3},,gallery" for i in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["path,pid,camid,split", *rows]))
    report = evaluate_features(*load_features(tmp_path / "f.npz", tmp_path / "list.csv"))
    expected = []
    for i in range(3):
        distance = np.linalg.norm(
            features / np.linalg.norm(features, axis=1)[:, None]
            - features[i] / np.linalg.norm(features[i]),
            axis=1,
        )
        others = np.argsort(distance)[1:]  # the query itself comes first
        expected.append(1 / (1 + list(others).index(i + 3)))
    assert report["per_query_AP"] == pytest.approx(expected)


def test_camera_pairs_of_too_many_cameras_are_left_out(tmp_path: Path) -> None:
    found = arrays(900)
    found["query_camids"], found["gallery_camids"] = np.arange(20), np.arange(880) + 20
    np.savez(tmp_path / "all.npz", **found)
    report = evaluate_features(*load_features(tmp_path / "all.npz"))
    assert report["camera_pairs"] is None
    assert "camera to the column's" not in report_text(report)


def test_files_of_very_many_members_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.npz", "w") as archive:
        for number in range(50):
            archive.writestr(f"{number:060000}", b"")
    with pytest.raises(DataError, match=r"has no array 'query_feat'") as info:
        load_features(tmp_path / "all.npz")
    assert len(str(info.value)) < 1_000_000
    with zipfile.ZipFile(tmp_path / "all.npz", "a") as archive:
        for number in range(50, 200):
            archive.writestr(f"{number:060000}", b"")
    with pytest.raises(DataError, match=r"list of records has 12,\d{3},\d{3} bytes"):
        load_features(tmp_path / "all.npz")


@pytest.mark.skipif(np.finfo(np.longdouble).max == np.finfo(float).max, reason="no wider floats")
def test_numbers_beyond_double_precision_are_scaled_too(tmp_path: Path) -> None:
    found = arrays()
    np.savez(tmp_path / "all.npz", **found)
    expected = evaluate_features(*load_features(tmp_path / "all.npz"))
    for name in ("query_feat", "gallery_feat"):
        found[name] = found[name] * np.longdouble("1e4000")
    np.savez(tmp_path / "all.npz", **found)
    assert evaluate_features(*load_features(tmp_path / "all.npz")) == expected


def test_distances_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "all.npz", **arrays())
    passes: list[int] = []
    compute = ranking.distance_blocks

    def counted(*features: Tensor) -> Iterator[tuple[int, Distances]]:
        passes.append(1)
        return compute(*features)

    monkeypatch.setattr(ranking, "distance_blocks", counted)
    assert run(monkeypatch, tmp_path / "all.npz") == 0
    assert len(passes) == 1
    assert run(monkeypatch, tmp_path / "all.npz", "AP", "trapezoid") == 0
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pids": None}, "has no array 'query_pids'"),
        ({"query_pids": np.zeros(3, int)}, "query_pids must be 20 whole numbers"),
        ({"gallery_camids": np.zeros(40)}, "gallery_camids must be 40 whole numbers, got float64"),
        ({"query_feat": np.zeros(20)}, r"query_feat must be numbers (N, D), got float64 (20,)"),
        ({"gallery_pids": np.full(40, -3)}, "gallery: pids must be -1 or more"),
    ],
)
def test_wrong_arrays_are_named(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    found = {name: value for name, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "f.npz", **found)
    with pytest.raises(DataError) as caught:
        load_features(tmp_path / "f.npz")
    assert str(tmp_path / "f.npz") in str(caught.value)
    assert message in str(caught.value)


def test_wrong_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", query_feat=np.array([{}], dtype=object))
    np.savez(tmp_path / "all.npz", **arrays())
    assert run(monkeypatch, tmp_path / "all.npz", "--output", tmp_path / "one.npy" / "x") == 2
    assert "OutputError: " in capsys.readouterr().err
    for name in ("gone.npz", "broken.npz", "one.npy", "pickled.npz"):
        assert run(monkeypatch, tmp_path / name) == 2
        assert f"DataError: {tmp_path / name}" in capsys.readouterr().err
    np.savez_compressed(tmp_path / "bomb.npz", more=np.zeros(80 * 2**20, np.int8))
    with pytest.raises(DataError, match=r"bomb\.npz: .* bytes unpack to 83,886,208; if that is"):
        load_features(tmp_path / "bomb.npz")
    np.savez(tmp_path / "f.npz", features=np.zeros((3, 2)))
    write_csv(tmp_path / "list.csv", arrays())
    with pytest.raises(DataError, match=r"has 3 features, but .* lists 61 images"):
        load_features(tmp_path / "f.npz", tmp_path / "list.csv")


def scaled(name: str, factor: float, dtype: type = np.float64) -> dict[str, np.ndarray]:
    found = arrays()
    return found | {f"{split}_{name}": found[f"{split}_{name}"].astype(dtype) * dtype(factor)
                    for split in ("query", "gallery")}  # fmt: skip


@pytest.mark.parametrize(("factor", "dtype"), [
    (1e19, np.float32), (1e-13, np.float32), (2.0**-140, np.float32), (1e300, np.float64),
    (1e-300, np.float64), (2.0**-14, np.float16),
])  # fmt: skip
def test_features_of_any_scale_give_the_same_figures(
    tmp_path: Path, factor: float, dtype: type
) -> None:
    reports = []
    for scale in (1, factor):
        np.savez(tmp_path / "f.npz", **scaled("feat", scale, dtype))
        reports.append(evaluate_file(tmp_path / "f.npz"))
    # features near the end of their range have fewer digits
    near_the_end = 0.02 if dtype is not np.float64 and abs(factor) < 1e-30 else 0
    assert reports[0]["numbers"] == pytest.approx(reports[1]["numbers"], abs=near_the_end)


def test_whole_numbers_are_features_too(tmp_path: Path) -> None:
    found = arrays()
    for split in ("query", "gallery"):
        found[f"{split}_feat"] = np.round(found[f"{split}_feat"] * 1e15).astype(np.int64)
    found["query_feat"][0, 0] = np.iinfo(np.int64).min  # has no positive counterpart
    np.savez(tmp_path / "f.npz", **found)
    query = load_features(tmp_path / "f.npz").query.test
    torch.testing.assert_close(query.norm(dim=1), torch.ones(20))


def test_rows_of_zeros_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = arrays()
    found["gallery_feat"][[3, 17]] = 0
    np.savez(tmp_path / "f.npz", **found)
    gallery = load_features(tmp_path / "f.npz").gallery.test
    assert (gallery == 0).all(1).nonzero().flatten().tolist() == [3, 17]
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'f.npz'}: 2 of 40 rows of gallery_feat are zeros")
    assert message.endswith("row 3, 17")
    np.savez(tmp_path / "f.npz", **scaled("feat", 0.0))
    with pytest.raises(DataError, match=r"f\.npz: all 20 rows of query_feat are zeros"):
        load_features(tmp_path / "f.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    found = arrays()
    found["query_feat"][5, 2] = value
    np.savez(tmp_path / "f.npz", **found)
    with pytest.raises(
        DataError, match="query_feat has values that are not finite, first in row=5"
    ):
        load_features(tmp_path / "f.npz")


def test_more_cameras_than_a_table_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = CameraPairRanks.MOST_CAMERAS + 1
    features = np.random.default_rng(0).normal(size=(count, 8))
    found = {f"{split}_feat": features for split in ("query", "gallery")}
    found |= {f"{split}_pids": np.arange(count) for split in ("query", "gallery")}
    cameras = {"query_camids": np.arange(count), "gallery_camids": np.arange(count) + 1}
    np.savez(tmp_path / "f.npz", **found, **cameras)
    report = evaluate_file(tmp_path / "f.npz")
    assert report["camera_pairs"] is None
    assert report["numbers"]["mAP"] == 1
    assert f"more than {count - 1} make no table" in caplog.text
    text = report_text(report)
    assert "Hardest queries" in text
    assert "camera to the column" not in text
    cameras["query_camids"] = cameras["query_camids"] % 200
    cameras["gallery_camids"] = (cameras["query_camids"] + 1) % 200
    np.savez(tmp_path / "f.npz", **found, **cameras)
    assert len(evaluate_file(tmp_path / "f.npz")["camera_pairs"]["mAP"]) == 200


@pytest.mark.slow
def test_many_dimensions_take_little_memory(tmp_path: Path) -> None:
    """Three features of 200,000 dimensions took 8.5 GB."""
    features = np.zeros((3, 200_000), np.float32)
    features[:, :2] = [[1, 0], [1, 1], [0, 1]]
    found = {f"{split}_feat": features for split in ("query", "gallery")}
    found |= {f"{split}_pids": np.array([0, 0, 1]) for split in ("query", "gallery")}
    found |= {"query_camids": np.zeros(3, int), "gallery_camids": np.ones(3, int)}
    np.savez_compressed(tmp_path / "f.npz", **found)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "import reid.evaluation.report as report\n"
        "soft = int(Path('/proc/self/statm').read_text().split()[0]) * 4096 + 900 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (soft, soft))\n"
        "print(report.evaluate_file(Path(sys.argv[1]))['numbers']['mAP'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f.npz")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "1.0\n", done.stderr


@pytest.mark.parametrize(("place", "error"), [
    ("feature_files.np.load", MemoryError("Unable to allocate 9 GiB")),
    ("report.rank", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
])  # fmt: skip
def test_out_of_memory_errors_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    np.savez(tmp_path / "f.npz", **arrays())
    monkeypatch.setattr(f"reid.evaluation.{place}", fail)
    with pytest.raises(DataError, match=r"f\.npz: memory is too small for its features"):
        evaluate_file(tmp_path / "f.npz")


def test_other_errors_pass_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    np.savez(tmp_path / "f.npz", **arrays())
    monkeypatch.setattr("reid.evaluation.report.rank", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate_file(tmp_path / "f.npz")


def test_a_member_that_is_not_an_array_is_an_error(tmp_path: Path) -> None:
    for name in ("query_pids", "query_pids.npy"):
        np.savez(tmp_path / "f.npz", **{k: v for k, v in arrays().items() if k != "query_pids"})
        with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive:
            archive.writestr(name, b"1 2 3")
        with pytest.raises(
            DataError, match=r"f\.npz: (query_pids is not an array|cannot be read as)"
        ):
            load_features(tmp_path / "f.npz")
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive:
        archive.writestr("notes.txt", b"what nobody asks for is not looked at")


@pytest.mark.parametrize(("content", "message"), [
    (b"<!DOCTYPE html>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    (b"", "it is empty"),
    (b"\x93NUMPY\1\0", r"it is an array of NumPy \(\.npy\)"),
])  # fmt: skip
def test_errors_name_the_kind_of_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"f\.npz: .*{message}.*expected what numpy\.savez writes"):
        load_features(tmp_path / "f.npz")


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device")):
        with pytest.raises(DataError, match=rf"{name}\.npz: is a {kind}, expected a regular file"):
            load_features(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "f.npz", features=np.eye(3))
    with pytest.raises(DataError, match=r"pipe\.npz: is a pipe, expected a regular file"):
        load_features(tmp_path / "f.npz", tmp_path / "pipe.npz")


@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_links_and_devices_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "f.npz", **arrays())
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "link").symlink_to(tmp_path / "out.json")
    for name in ("null", "link"):
        assert run(monkeypatch, tmp_path / "f.npz", "--output", tmp_path / name) == 0
        assert (tmp_path / name).is_symlink()
    assert Path("/dev/null").is_char_device()
    assert json.loads((tmp_path / "out.json").read_text())["numbers"]
