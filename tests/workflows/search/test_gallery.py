"""The file of a gallery: written whole, checked when read."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reid.locks import locked
from reid.neighbors.similar import most_similar
from reid.structures import DataError
from reid.workflows.search import gallery, upkeep
from reid.workflows.search.features import ModelChoice
from reid.workflows.search.gallery import FILE, PathTable, read_gallery

if TYPE_CHECKING:
    from tests.workflows.search.conftest import People


def test_paths_of_any_bytes_come_back() -> None:
    paths = ["a.jpg", "ü/b.jpg", "c\udcff.jpg"]
    table = PathTable.of(paths)
    assert list(table) == paths
    assert table[-1] == paths[-1]
    assert table[:2] == paths[:2]
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(ValueError, match="end to end"):
        PathTable(table.letters, table.ends[::-1].copy())


def test_a_gallery_comes_back(people: People) -> None:
    found = read_gallery(people.gallery)
    assert list(found.paths) == people.paths
    assert [found.camera(row) for row in range(4)] == ["camera0", "camera1", "camera2", "camera0"]
    assert found.origin.weights_sha256 == "0" * 64
    assert found.hashes.any(1).all()
    assert [path.name for path in people.gallery.iterdir()] == [FILE]


def _killed_in_writing(tensors: object, path: Path, metadata: object) -> None:
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_it_writes_the_old_one_stays(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (people.gallery / FILE).read_bytes()
    more = people.write("more.npz", ["/new.png"], people.make([3], seed=2))
    child = os.fork()
    if not child:
        try:
            gallery.save_file = _killed_in_writing
            upkeep.add(people.gallery, [more], ModelChoice())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (people.gallery / FILE).read_bytes() == before
    assert len([*people.gallery.iterdir()]) > 1
    assert run_tool("add", people.gallery, more) == 0
    assert "1 added" in capsys.readouterr().out
    assert [path.name for path in people.gallery.iterdir()] == [FILE]
    assert len(read_gallery(people.gallery)) == 25


def test_a_second_writer_is_refused(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(people.gallery):
        assert run_tool("add", people.gallery, people.features) == 2
        assert run_tool("info", people.gallery) == 0  # who reads waits for nobody
    told = capsys.readouterr()
    assert f"people is in use by process {os.getpid()}" in told.err
    assert "24 images, 3 cameras, 16 dimensions" in told.out


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["reid_gallery"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, {"reid_gallery": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, h: t["features"][3].fill_(float("nan")), "row 3 has a squared length of nan"),
        (lambda t, h: t.update(features=t["features"][:5].clone()), r"path_ends: expected int64"),
        (lambda t, h: t.update(features=t["features"].half()), "features: expected float32"),
        (lambda t, h: t["camids"].fill_(3), "camids: expected -1 to 2"),
        (lambda t, h: t["path_ends"].neg_(), "end to end"),
        (lambda t, h: t["path_ends"][-1:].add_(2**40), "end to end"),
        (lambda t, h: t.pop("hashes"), "hashes: expected uint8"),
        (lambda t, h: t.update(features=torch.empty(0, 16)), r"features: expected \(N, D\)"),
        (lambda t, h: h.update(format=2), "format"),
        (lambda t, h: h["origin"].pop("fingerprint"), "fingerprint: is missing"),
        (lambda t, h: h["origin"].update(model=3), "origin.model"),
        (lambda t, h: h.update(surprise=1), "surprise: unknown key"),
    ],
)
def test_broken_ones_are_refused(people: People, change: Any, reason: str) -> None:
    rewrite(people.gallery / FILE, change)
    with pytest.raises(DataError, match=reason) as told:
        read_gallery(people.gallery)
    assert str(people.gallery) in str(told.value)


def test_what_is_no_gallery_is_told_in_a_line(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("info", people.folder / "nowhere") == 2
    path = people.gallery / FILE
    content = path.read_bytes()
    for broken in (b"", content[: len(content) // 2], b"\xff" * 64, b"\x80\x04K\x01.", b"\0" * 9):
        path.write_bytes(broken)
        assert run_tool("query", people.gallery, people.features) == 2
    path.unlink()
    os.mkfifo(path)
    assert run_tool("query", people.gallery, people.features) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("DataError: ") and FILE in line for line in lines)
    assert "make one with tools/search.py build" in lines[0]
    assert "is a pipe, expected a regular file" in lines[-1]


def test_damaged_bytes_are_refused_or_read(people: People) -> None:
    path, seed = people.gallery / FILE, random.randrange(2**32)
    content, rng, refused = path.read_bytes(), random.Random(seed), 0
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.choice((1, 3))):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 8))] = rng.randbytes(rng.choice((0, 1, 8)))
        path.write_bytes(data)
        try:
            read = read_gallery(people.gallery)
        except DataError:
            refused += 1
            continue
        found = most_similar(read.index(), read.features[:2], read.features, 3)
        assert np.isfinite(found.scores).all(), f"seed {seed}"
    assert refused > 20, f"seed {seed}"
