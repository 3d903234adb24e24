from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from reid.evaluation.visualize import draw_ranked_lists
from reid.structures import DataError


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 40), (60 * i, 0, 255)).save(path)
        paths.append(str(path))
    return paths


def test_right_matches_are_green_and_wrong_ones_red(tmp_path: Path, images: list[str]) -> None:
    path = tmp_path / "out" / "ranked.png"
    draw_ranked_lists(path, images[:2], [[(images[2], True), (images[3], False)], []])
    with Image.open(path) as picture:
        colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    assert colours[34, 160, 84] > 500
    assert colours[212, 56, 56] > 500
    assert [entry.name for entry in path.parent.iterdir()] == ["ranked.png"]


def test_errors_leave_no_file(tmp_path: Path, images: list[str]) -> None:
    path = tmp_path / "out" / "ranked.png"
    with pytest.raises(DataError, match=r"gone\.png: is not a readable image"):
        draw_ranked_lists(path, images[:1], [[(str(tmp_path / "gone.png"), True)]])
    assert not path.exists()
    with pytest.raises(ValueError, match="expected 1 lists, got 2"):
        draw_ranked_lists(path, images[:1], [[], []])
    with pytest.raises(ValueError, match="expected one or more"):
        draw_ranked_lists(path, [], [])
