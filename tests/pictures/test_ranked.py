from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.ranking import rank
from reid.pictures.canvas import GREEN, GREY, RED
from reid.pictures.ranked import draw_evaluation, draw_matches
from reid.structures import DataError, FeatureSet


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Each of two queries has a match, junk and a wrong answer."""
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 40), (40 * i, 0, 255)).save(path)
    features = torch.nn.functional.normalize(torch.eye(6) + 0.3, dim=1)
    whole = FeatureSet.of(features, torch.tensor([1, 2, 1, 2, 1, 2]), torch.arange(6) // 2 % 2)
    details = Details(similarities=True, ranked_lists=2)
    return rank(
        whole[:2], whole[2:], details=details, query_paths=paths[:2], gallery_paths=paths[2:]
    )


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        found = picture.getcolors(1 << 24)
    assert found is not None
    return {colour for count, colour in found if count > 500}


def test_matches_with_and_without_junk(evaluation: Evaluation, tmp_path: Path) -> None:
    lists, paths = evaluation.ranked_lists, (evaluation.query_paths, evaluation.gallery_paths)
    assert lists is not None
    assert paths[0] is not None
    assert paths[1] is not None
    draw_matches(tmp_path / "kept.png", lists, paths[0], paths[1])
    draw_matches(tmp_path / "all.png", lists, paths[0], paths[1], keep_junk=True)
    assert {GREEN, RED} <= colours(tmp_path / "kept.png")
    assert GREY not in colours(tmp_path / "kept.png")
    assert {GREEN, RED, GREY} <= colours(tmp_path / "all.png")


def test_pictures_of_an_evaluation(
    evaluation: Evaluation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = draw_evaluation(evaluation, "set", tmp_path)
    assert drawn == [tmp_path / "ranked_lists.png", tmp_path / "similarities.png"]
    assert all(path.is_file() for path in drawn)
    pairs = evaluation.similarities
    assert pairs is not None
    alike = replace(evaluation, similarities=replace(pairs, others=pairs.others * 0))
    with caplog.at_level(logging.WARNING):
        assert draw_evaluation(alike, "set", tmp_path) == drawn[:1]
    assert "set: no histogram of similarities (expected pairs" in caplog.text
    with pytest.raises(ValueError, match="expected one with paths, ranked lists and similarities"):
        draw_evaluation(replace(evaluation, query_paths=None), "set", tmp_path)
    assert evaluation.gallery_paths is not None
    Path(evaluation.gallery_paths[0]).unlink()
    with pytest.raises(DataError):
        draw_evaluation(evaluation, "set", tmp_path)
