from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid.data import cache as module
from reid.data.cache import FileCache, PixelCache, available_bytes, cache_bytes, size_text
from reid.data.images import read_image
from reid.structures import DataError


def test_it_returns_what_was_stored() -> None:
    cache = PixelCache(3, (4, 2))
    assert cache.num_bytes == cache_bytes(3, (4, 2)) == 3 * 4 * 2 * 3 + 3
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    assert cache.get(1) is None
    cache.put(1, pixels)
    assert np.array_equal(cache.get(1), pixels)
    assert cache.get(0) is cache.get(2) is None


def test_too_little_memory_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_available_memory", lambda: 10**9)
    assert available_bytes(shared=False) == 10**9
    assert PixelCache(1000, (256, 128)).available == 10**9
    with pytest.raises(ValueError, match=r"12,000 images of 256x128 need 1\.18 GB .* 1\.00 GB"):
        PixelCache(12000, (256, 128))
    with pytest.raises(ValueError, match=r"need 1\.97 GB of memory, 1\.00 GB are available"):
        PixelCache(10000, (256, 128), copies=2)


def test_files_that_change_or_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / name) for name in ("still.png", "changed.png", "missing.png")]
    for path in paths[:2]:
        Image.new("RGB", (2, 3), (10, 20, 30)).save(path)
    cache = FileCache(paths)
    assert cache.num_bytes == sum(Path(path).stat().st_size for path in paths[:2]) + 3
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(paths[1])
    for _ in range(2):
        assert cache.pixels(0, paths[0], read_image).shape == (3, 2, 3)
        assert cache.pixels(1, paths[1], read_image).shape == (4, 5, 3)
        with pytest.raises(DataError, match=r"missing\.png: is not a readable image \(there is no"):
            cache.pixels(2, paths[2], read_image)
    monkeypatch.setattr(module, "_available_memory", lambda: 10)
    with pytest.raises(ValueError, match=r"the files of 3 images need .* of memory, 0 MB are"):
        FileCache(paths)


def test_sizes_read_well() -> None:
    assert size_text(3_210_000_000) == "3.21 GB"
    assert size_text(25_166_080) == "25 MB"
    assert available_bytes(shared=True) <= available_bytes(shared=False) * 1.5
    assert available_bytes(shared=False) > 10**7
