from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from reid.pictures.canvas import CELL, GREEN, GREY, PALETTE, RED, text_width
from reid.pictures.sheets import (
    camera_colour,
    draw_attention,
    draw_clusters,
    draw_ranked_lists,
    draw_stripes,
    stripe_edges,
)
from reid.structures import DataError, ImageRecord


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 40), (60 * i, 0, 255)).save(path)
        paths.append(str(path))
    return paths


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as picture:
        found = picture.getcolors(1 << 24)
    assert found is not None
    return {colour: count for count, colour in found}


def test_verdicts_have_colours_and_marks(tmp_path: Path, images: list[str]) -> None:
    path = tmp_path / "out" / "ranked.png"
    row = [(images[2], "same"), (images[3], "other"), (images[1], "junk")]
    draw_ranked_lists(path, images[:2], [row, []])
    counts = colours(path)
    assert min(counts[GREEN], counts[RED], counts[GREY]) > 500
    assert counts[GREY] < 0.7 * counts[GREEN]  # dashed
    assert [entry.name for entry in path.parent.iterdir()] == ["ranked.png"]


def test_errors_leave_no_file(tmp_path: Path, images: list[str]) -> None:
    path = tmp_path / "out" / "ranked.png"
    with pytest.raises(DataError, match=r"gone\.png: is not a readable image"):
        draw_ranked_lists(path, images[:1], [[(str(tmp_path / "gone.png"), "same")]])
    assert not path.exists()
    with pytest.raises(ValueError, match="expected 1 lists, got 2"):
        draw_ranked_lists(path, images[:1], [[], []])
    with pytest.raises(ValueError, match="expected one or more"):
        draw_ranked_lists(path, [], [])


def test_clusters_from_the_largest_to_the_smallest(tmp_path: Path, images: list[str]) -> None:
    records = [ImageRecord(images[i % 4], pid=i // 4, camid=i % 3) for i in range(12)]
    clusters = [0] * 3 + [1] * 6 + [2] * 2 + [-1]
    path = tmp_path / "clusters.png"
    assert draw_clusters(path, clusters, records) == [1, 0, 2]
    counts = colours(path)
    assert counts[RED] > 500  # cluster 1 has images of two identities
    assert min(counts[camera_colour(camid)] for camid in range(3)) > 1000
    assert draw_clusters(path, clusters, records, rows=2) == [1, 2]
    assert draw_clusters(path, torch.tensor(clusters), records, chosen=[-1, 2]) == [-1, 2]
    pure = [0] * 4 + [1] * 4 + [2] * 4
    draw_clusters(path, pure, records)
    assert RED not in {c for c, n in colours(path).items() if n > 800}
    unlabelled = [ImageRecord(record.path) for record in records]
    draw_clusters(path, clusters, unlabelled, rows=1, columns=2)
    assert RED not in colours(path)


def test_cameras_have_their_names(
    tmp_path: Path, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, where: Any, words: str, **options: Any) -> None:
        written.append(words)
        draw_text(self, where, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    records = [
        ImageRecord(images[0], camid=0, extra={"camera": "hall"}),
        ImageRecord(images[1], camid=1, extra={"camera": "the entrance of the car park"}),
        ImageRecord(images[2], camid=2),
        ImageRecord(images[3]),
    ]
    draw_clusters(tmp_path / "clusters.png", [0, 0, 0, 0], records)
    assert [words for words in written if words in ("hall", "camera 2", "camera ?")] == [
        "camera ?", "hall", "camera 2"]  # fmt: skip
    (long,) = [words for words in written if words.endswith("…")]
    assert "the entrance of the car park".startswith(long[:-1])
    assert 60 < text_width(long, 15) <= CELL[0]


def test_cluster_errors(tmp_path: Path, images: list[str]) -> None:
    path, records = tmp_path / "clusters.png", [ImageRecord(images[0])] * 3
    with pytest.raises(ValueError, match="expected 3, one per image, got 2"):
        draw_clusters(path, [0, 0], records)
    with pytest.raises(ValueError, match="all images are outliers"):
        draw_clusters(path, [-1, -1, -1], records)
    with pytest.raises(ValueError, match=r"clusters that have images, got \[7\]"):
        draw_clusters(path, [0, 0, -1], records, chosen=[7])
    with pytest.raises(ValueError, match="rows and columns of 1 or more"):
        draw_clusters(path, [0, 0, -1], records, rows=0)
    assert not path.exists()


def test_attention_is_bright_where_it_is_high(tmp_path: Path, images: list[str]) -> None:
    maps = torch.zeros(1, 4, 2)
    maps[0, 0] = 1  # the top row of patches
    path = tmp_path / "attention.png"
    draw_attention(path, images[:1], [("model", maps), ("flat", torch.ones(1, 4, 2))])
    with Image.open(path) as picture:
        pixels = np.asarray(picture).astype(int).sum(2)
    column = pixels[58:250, 24 + 96 + 20 + 48]  # the middle of the first map
    assert column[5] > 2 * column[-5]
    with pytest.raises(ValueError, match=r"model: expected maps \(2, h, w\), got \(1, 4, 2\)"):
        draw_attention(path, images[:2], [("model", maps)])
    with pytest.raises(ValueError, match="one or more images and columns"):
        draw_attention(path, images[:1], [])


def test_stripes(tmp_path: Path, images: list[str]) -> None:
    assert stripe_edges(6, 3) == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    assert stripe_edges(5, 2) == [(0, 3 / 5), (3 / 5, 1)]
    with pytest.raises(ValueError, match="parts: expected 1 to 2, got 3"):
        stripe_edges(2, 3)
    draw_stripes(tmp_path / "stripes.png", images[:2], 6, (2, 3))
    counts = colours(tmp_path / "stripes.png")
    assert min(counts[colour] for colour in PALETTE[:5]) > 1000
    with pytest.raises(ValueError, match="one or more images and parts"):
        draw_stripes(tmp_path / "stripes.png", images, 6, ())
