from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reid.evaluation.evaluation import PairSimilarities
from reid.pictures.plots import draw_embedding, draw_similarities, embed, similarity_thresholds


def pairs(matching: list[int], others: list[int]) -> PairSimilarities:
    """Pairs in bins of squared distances from 0 to 4."""
    return PairSimilarities(np.array(matching), np.array(others), len(matching) / 4)


def test_thresholds_let_few_wrong_pairs_through() -> None:
    edges = np.linspace(-1, 1, 5)
    positive, negative = np.array([1, 2, 3, 4]), np.array([880, 100, 15, 5])
    found = similarity_thresholds(positive, negative, edges, (0.02, 5e-3, 1e-3, 1e-4))
    # from 0 on there are 20 of 1,000; from 0.5 on 5; above 1 none; 1 of 10,000 cannot be told
    assert [tuple(threshold) for threshold in found] == [
        (0.0, 0.02, 0.7), (0.5, 5e-3, 0.4), (1.0, 1e-3, 0.0),
    ]  # fmt: skip
    assert similarity_thresholds(positive, 0 * negative, edges) == []


def test_histogram_is_drawn(tmp_path: Path) -> None:
    draw_similarities(tmp_path / "s.png", pairs([9, 3, 0, 0], [0, 2, 30, 4]), bins=4)
    with Image.open(tmp_path / "s.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    with pytest.raises(ValueError, match="different persons, got 0 and 4"):
        draw_similarities(tmp_path / "no.png", pairs([0, 0], [1, 3]))
    with pytest.raises(ValueError, match="different persons, got 2 and 0"):
        draw_similarities(tmp_path / "no.png", pairs([1, 1], [0, 0]))
    with pytest.raises(ValueError, match="bins: expected 1 or more"):
        draw_similarities(tmp_path / "no.png", pairs([1, 1], [1, 1]), bins=0)
    assert not (tmp_path / "no.png").exists()


def test_near_features_are_near_in_the_plane(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(3).repeat_interleave(12)
    found = F.normalize(torch.eye(8)[groups] + 0.05 * torch.randn(36, 8, generator=generator))
    points = embed(found)
    assert points.shape == (36, 2)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    nearest = np.argsort(distance, axis=1)[:, 1]
    assert (groups.numpy()[nearest] == groups.numpy()).mean() > 0.9
    assert np.array_equal(points, embed(found))
    groups[0] = -1
    draw_embedding(tmp_path / "e.png", points, groups, "title", largest=2)
    with Image.open(tmp_path / "e.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    with pytest.raises(ValueError, match=r"points: expected \(36, 2\)"):
        draw_embedding(tmp_path / "e.png", points[:3], groups, "title")
    with pytest.raises(ValueError, match="3 images or more, got 2"):
        embed(found[:2])


def test_umap_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match=r"umap-learn, which is not installed: pip inst"):
        embed(torch.eye(4), "umap")
