from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from reid.evaluation import ranking
from reid.evaluation.ranking_kernels import Distances
from reid.evaluation.report import evaluate_features, load_features, report_text
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
def test_every_table_is_of_the_ranking_that_the_numbers_are_of(
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


def test_a_list_tells_that_a_query_is_in_the_gallery_too(tmp_path: Path) -> None:
    """Without cameras nothing else tells; the query itself would be a perfect match."""
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
