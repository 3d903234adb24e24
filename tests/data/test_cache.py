from __future__ import annotations

import numpy as np
import pytest

from reid.data import cache as module
from reid.data.cache import PixelCache, available_bytes, cache_bytes, size_text


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


def test_sizes_read_well() -> None:
    assert size_text(3_210_000_000) == "3.21 GB"
    assert size_text(25_166_080) == "25 MB"
    assert available_bytes(shared=True) <= available_bytes(shared=False) * 1.5
    assert available_bytes(shared=False) > 10**7
