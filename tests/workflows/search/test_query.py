"""What a search finds, and how it tells it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from reid.evaluation.thresholds import ThresholdRow, Thresholds
from reid.registry import ConfigError
from reid.structures import DataError
from reid.workflows.search.features import ModelChoice, _thresholds_of
from reid.workflows.search.gallery import Origin, read_gallery, write_gallery
from reid.workflows.search.output import threshold_text
from reid.workflows.search.query import Answer, QuerySettings, choose_threshold, search
from reid.workflows.thresholds import save_thresholds

if TYPE_CHECKING:
    from tests.workflows.search.conftest import People

TABLE = Thresholds(
    "clusters", "made", 10, 1000, [ThresholdRow(0.9, 100, 0.5), ThresholdRow(0.6, 5000, 0.9)]
)


def paths_of(people: People, **settings: object) -> list[list[str]]:
    found = search(people.gallery, [people.features], ModelChoice(), QuerySettings(**settings))  # type: ignore[arg-type]
    return [[answer.path for answer in query.answers] for query in found.queries]


def test_the_same_persons_come_first_and_never_the_image_itself(people: People) -> None:
    features = read_gallery(people.gallery).features
    similarity = features @ features.T
    np.fill_diagonal(similarity, -2)
    for row, found in enumerate(paths_of(people, top=23)):
        expected = [people.paths[place] for place in np.argsort(-similarity[row])[:23]]
        assert found == expected
        assert {path[-7] for path in found[:3]} == {people.paths[row][-7]}


def test_a_copy_of_a_file_does_not_find_its_original(people: People) -> None:
    copy, link = people.folder / "copy.png", people.folder / "link.png"
    shutil.copy(people.paths[4], copy)
    link.symlink_to(people.paths[5])
    other = people.folder / "other.png"
    Image.new("RGB", (8, 16), (255, 255, 255)).save(other)
    features = people.make([row // 4 for row in range(24)])[[4, 5, 6]]
    queries = people.write("q.npz", [str(copy), str(link), str(other)], features)
    found = search(people.gallery, [queries], ModelChoice(), QuerySettings(top=3)).queries
    for query, own, there in zip(found, people.paths[4:7], (False, False, True), strict=True):
        assert (own in [answer.path for answer in query.answers]) == there
        assert len(query.answers) == 3


def test_cameras(people: People) -> None:
    gallery = read_gallery(people.gallery)
    camera = {path: gallery.camera(row) for row, path in enumerate(gallery.paths)}
    for cameras, same in (("same", True), ("other", False)):
        lines = paths_of(people, top=24, cameras=cameras)
        for query, found in zip(people.paths, lines, strict=True):
            assert len(found) == (7 if same else 16)
            assert all((camera[path] == camera[query]) == same for path in found)
    choice = ModelChoice(camera="camera9")
    everyone = QuerySettings(top=24, cameras="other")
    assert len(search(people.gallery, [people.features], choice, everyone).queries[0].answers) == 23
    nobody = QuerySettings(cameras="same")
    assert not search(people.gallery, [people.features], choice, nobody).queries[0].answers


def test_a_camera_that_is_needed_and_unknown(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = people.write("n.npz", ["/n.png"], people.make([1]))
    rows = np.load(new)
    arrays = {name: rows[name] for name in rows.files} | {"cameras": np.array([""])}
    np.savez(new, **arrays)
    with pytest.raises(DataError, match=r"n\.png: its camera is unknown"):
        search(people.gallery, [new], ModelChoice(), QuerySettings(cameras="other"))
    # an image that lies in the gallery has its camera there
    np.savez(new, **(arrays | {"paths": np.array([people.paths[1]])}))
    found = search(people.gallery, [new], ModelChoice(), QuerySettings(cameras="other"))
    assert found.queries[0].camera == "camera1"


def test_re_ranking_orders_the_first_answers_anew(people: People) -> None:
    features = people.make([0, 3], seed=7)
    queries = people.write("q.npz", ["/0.png", "/1.png"], features)

    def answers(**settings: object) -> list[list[Answer]]:
        chosen = QuerySettings(**settings)  # type: ignore[arg-type]
        found = search(people.gallery, [queries], ModelChoice(), chosen)
        return [query.answers for query in found.queries]

    plain = [[answer.path for answer in line] for line in answers(top=12)]
    weighted = answers(top=12, rerank=12, lambda_value=1.0)  # the first distance alone counts
    assert [[answer.path for answer in line] for line in weighted] == plain
    for line, before in zip(answers(top=5, rerank=12, k1=4, k2=2), plain, strict=True):
        distances = [answer.distance for answer in line]
        assert distances == sorted(distances, key=lambda value: value or 0)
        assert {answer.path for answer in line} <= {*before}


def test_thresholds_mark_the_same_person(
    people: People, monkeypatch: pytest.MonkeyPatch, run_tool: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("reid.workflows.search.features.load_thresholds", lambda *_: TABLE)
    monkeypatch.setattr("reid.workflows.search.features._told", lambda rows: _origin(people))
    assert run_tool("build", people.gallery, people.features, "--overwrite") == 0
    out = people.folder
    arguments = ["--csv", out / "f.csv", "--json", out / "f.json", "--picture", out / "f.png"]
    assert run_tool("query", people.gallery, people.features, "--top", 8, *arguments) == 0
    text = capsys.readouterr().out
    assert "similarity of 0.900 or more, 100 false matches per million" in text
    assert "from clusters, not labels: take care" in text
    assert "... and 19 queries more" in text
    lines = [*csv.DictReader((out / "f.csv").read_text().splitlines())]
    assert len(lines) == 24 * 8
    for line in lines:
        similarity = float(line["similarity"])
        assert line["same_person"] == ("yes" if similarity >= 0.9 else "no")
        rate = "100" if similarity >= 0.9 else "5000" if similarity >= 0.6 else ""
        assert line["false_matches_per_million"] == rate
    content = json.loads((out / "f.json").read_text())
    assert content["threshold"] == {
        "similarity": 0.9, "false_per_million": 100, "source": "clusters",
    }  # fmt: skip
    assert [len(query["answers"]) for query in content["queries"]] == [8] * 24
    with Image.open(out / "f.png") as picture:
        assert (34, 160, 84) in [colour for _, colour in picture.getcolors(2**20) or ()]


def _origin(people: People) -> object:
    return Origin("f" * 64, str(people.features), str(people.features), "0" * 64)


def test_a_threshold_by_its_rate() -> None:
    chosen = choose_threshold(TABLE, 6000)
    assert chosen is not None
    assert chosen.similarity == 0.6
    assert "in a gallery of 2,000 images about 10 false matches per query" in threshold_text(
        chosen, 2000
    )
    with pytest.raises(ConfigError, match="expected 100 or more"):
        choose_threshold(TABLE, 1)
    with pytest.raises(ConfigError, match="the model has no thresholds"):
        choose_threshold(None, 100)
    assert choose_threshold(None, None) is None


def test_pictures_that_are_gone_leave_empty_tiles(
    people: People, run_tool: Callable[..., int]
) -> None:
    picture = people.folder / "f.png"
    shutil.rmtree(people.folder / "crops")
    assert run_tool("query", people.gallery, people.features, "--picture", picture) == 0
    with Image.open(picture) as drawn:
        assert drawn.height > 24 * 200


def test_a_gallery_whose_model_is_gone_says_so(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("query", people.gallery, people.paths[0]) == 2
    assert "which was built from features and names none" in capsys.readouterr().err
    moved = replace(read_gallery(people.gallery), origin=Origin("f" * 64, "/nowhere/run"))
    write_gallery(people.gallery, moved)
    assert run_tool("query", people.gallery, people.paths[0]) == 2
    assert "model /nowhere/run is not there; pass --model" in capsys.readouterr().err


def test_each_output_has_its_own_file(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    one = people.folder / "one"
    query = ["query", people.gallery, people.features, "--csv", one, "--json", one]
    assert run_tool(*query) == 2
    assert "are one file" in capsys.readouterr().err
    assert not one.exists()


def test_names_of_any_bytes_are_kept_and_shown_in_one_line(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["/a\n  9  0.999  yes\x1b[2J.png", "/b\udcff.png"]
    features = people.write("odd.npz", odd, people.make([0, 0]))
    gallery = people.folder / "odd"
    assert run_tool("build", gallery, features, "--camera", "door\udcff\n") == 0
    capsys.readouterr()
    found = people.folder / "odd.csv"
    assert run_tool("query", gallery, people.features, "--top", 2, "--csv", found) == 0
    shown = capsys.readouterr().out
    assert "/a\\n  9  0.999  yes\\x1b[2J.png" in shown
    assert "/b\\xff.png" in shown
    assert "door\\xff\\n" in shown
    lines = csv.DictReader(io.StringIO(found.read_bytes().decode("utf-8", "surrogateescape")))
    assert {line["path"] for line in lines} == {*odd}


def test_thresholds_of_the_gallery_s_weights_count_for_each_file_of_the_model(
    people: People,
) -> None:
    weights = people.folder / "model.safetensors"
    weights.touch()
    origin = Origin("f" * 64, str(people.folder / "model.onnx"), str(weights))
    assert _thresholds_of(origin) is None
    save_thresholds(weights, origin.fingerprint, TABLE)
    assert _thresholds_of(origin) == TABLE
    assert _thresholds_of(replace(origin, fingerprint="0" * 64)) is None
