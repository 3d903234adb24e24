"""Clustering in shards: the labels of the clustering in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from reid.files import OutputError
from reid.neighbors import dbscan, inverted, jaccard_distance, nearest_neighbors
from reid.neighbors.density import dbscan_of_blocks
from reid.neighbors.exact import MARGIN
from reid.neighbors.kernels import Floats, Labels
from reid.neighbors.plan import Plan
from reid.neighbors.shards import (
    BlocksDone,
    Shards,
    ShardSettings,
    WorkFolder,
    cluster_in_shards,
    search,
)
from reid.neighbors.shards.folder import Facts
from reid.neighbors.shards.law import bytes_on_disk
from reid.neighbors.shards.search import pairs_of_round
from reid.neighbors.sparse import Rows
from reid.structures import ProgressBar


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(np.memmap, "flush", lambda array: None)
        yield


SEARCHES: tuple[Literal["exact", "ivf"], ...] = ("exact", "ivf")


@contextmanager
def quiet(title: str) -> Iterator[ProgressBar]:
    assert title
    yield lambda done, total: None


def in_shards(
    folder: Path, rows: Floats, options: ShardSettings, left: int | None = None
) -> Labels:
    shards = Shards(WorkFolder(folder), quiet, left)
    return np.array(cluster_in_shards(shards, rows, options))


def with_stops(folder: Path, rows: Floats, options: ShardSettings, left: int) -> tuple[Labels, int]:
    """The labels, and how often it stopped after so many blocks."""
    stops = 0
    while True:
        try:
            return in_shards(folder, rows, options, left), stops
        except BlocksDone:
            stops += 1


def in_memory(rows: Floats, options: ShardSettings) -> Labels:
    features = torch.from_numpy(rows)
    graph = jaccard_distance(features, options.k1, options.k2, search=options.search)
    return dbscan(graph, options.eps, options.min_samples)


def persons(count: int, dim: int = 16, noise: float = 0.6) -> Floats:
    """Unit vectors of persons with 12 images each, in no order, some of them equal."""
    rng = np.random.default_rng(count)
    centres = rng.normal(size=(max(2, count // 12), dim))
    rows = centres[rng.integers(len(centres), size=count)] + noise * rng.normal(size=(count, dim))
    rows[count // 2 : count // 2 + 9] = rows[0]
    return F.normalize(torch.from_numpy(rows), dim=1).float().numpy()


@st.composite
def unit_rows(draw: st.DrawFn) -> Floats:
    """Unit vectors: random, many equal, all equal, nearly equal, or on a coarse grid."""
    count, dim = draw(st.integers(1, 45)), draw(st.sampled_from((1, 2, 7, 16)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = rng.normal(size=(count, dim))
    kind = draw(st.sampled_from(("random", "groups", "equal", "constant", "close", "coarse")))
    if kind == "groups":
        rows = rows[rng.integers(0, max(1, count // 6), count)] + 0.2 * rows
    elif kind == "equal":
        rows = rows[rng.integers(0, max(1, count // 3), count)]
    elif kind == "constant":
        rows[:] = rows[0]
    elif kind == "close":
        rows = rows[0] + 1e-4 * rows
    elif kind == "coarse":
        rows = np.round(rows) + 0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(unit_rows(), st.data())
def test_labels_are_those_in_memory(rows: Floats, data: st.DataObject) -> None:
    options = ShardSettings(
        data.draw(st.integers(1, 25)), data.draw(st.integers(1, 7)),
        data.draw(st.sampled_from((0.3, 0.5, 0.8))), data.draw(st.integers(1, 5)),
        block_rows=data.draw(st.sampled_from((None, 4, 13, 40))),
        half_precision=data.draw(st.booleans()),
        dims=data.draw(st.integers(0, rows.shape[1])),
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        found = in_shards(Path(folder), rows, options)
    assert np.array_equal(found, in_memory(rows, options))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dims", [0, 5])
def test_lists_are_exact(
    half: bool, dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = persons(500)
    options = ShardSettings(15, 4, block_rows=90, half_precision=half, dims=dims)
    monkeypatch.setattr(WorkFolder, "remove", lambda self, *names: None)
    in_shards(tmp_path, rows, options)
    expected = nearest_neighbors(torch.from_numpy(rows), 15)
    folder = WorkFolder(tmp_path)
    assert np.array_equal(folder.array("lists"), expected)
    assert np.array_equal(folder.array("nearest"), expected[:, :4])
    again = sum(facts.get("again", 0) for facts in folder.done("lists").values())
    assert (again > 0) == (dims > 0)  # rows in doubt were searched again, too


def test_no_process_holds_more_than_two_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    empty = search.Candidates.empty

    def watched(room: int, count: int, slack: Floats, largest: float, k: int) -> Any:
        sizes.append(len(slack))
        return empty(room, count, slack, largest, k)

    monkeypatch.setattr(search.Candidates, "empty", watched)
    rows, memory = persons(900), 100_000
    options = ShardSettings(10, 4, memory=memory, half_precision=False)
    found = in_shards(tmp_path, rows, options)
    assert 2 * max(sizes) * (8 * 22 + 12) > memory / 2
    assert max(sizes) * (8 * 22 + 12) <= memory
    assert np.array_equal(found, in_memory(rows, options))


def test_the_folder_takes_what_the_law_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, options = persons(2000), ShardSettings(20, 4, block_rows=100, half_precision=False)
    note, taken = WorkFolder.note, dict[str, int]()

    def watched(self: WorkFolder, step: str, block: int, facts: Facts | None = None) -> None:
        size = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
        taken[step] = max(size, taken.get(step, 0))
        note(self, step, block, facts)

    monkeypatch.setattr(WorkFolder, "note", watched)
    in_shards(tmp_path, rows, options)
    law = bytes_on_disk(16, 20, 11, 4, Plan(0, 20 + MARGIN, False))
    last = {"search": "lists", "sets": "sets", "means": "means", "distances": "distances"}
    shares = {stage: taken[last[stage]] / len(rows) / law[stage] for stage in law}
    assert 0.9 < shares.pop("search") < 1.05
    assert all(0.4 < share < 1.05 for share in shares.values()), shares


def test_each_pair_of_blocks_meets_once() -> None:
    for blocks in (2, 4, 6, 20):
        pairs = [pairs_of_round(blocks, number) for number in range(1, blocks)]
        for round_ in pairs:
            assert sorted(block for pair in round_ for block in pair) == [*range(blocks)]
        every = sorted(pair for round_ in pairs for pair in round_)
        assert every == [(i, j) for i in range(blocks) for j in range(i + 1, blocks)]


def test_it_goes_on_after_each_block(tmp_path: Path) -> None:
    rows, options = persons(300), ShardSettings(10, 3, block_rows=80)
    found, stops = with_stops(tmp_path, rows, options, left=3)
    assert stops > 10
    assert np.array_equal(found, in_memory(rows, options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "labels.npy"]


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_after_kills(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies before or after a block is noted, or in the midst of the line."""
    rows, options = persons(260), ShardSettings(10, 3, block_rows=80, dims=5)
    random = np.random.default_rng(seed)
    note, kills = WorkFolder.note, 0

    class KilledError(Exception):
        pass

    def dying(self: WorkFolder, step: str, block: int, facts: Facts | None = None) -> None:
        chance = random.random()
        if chance < 0.08:
            raise KilledError
        note(self, step, block, facts)
        journal = tmp_path / "done" / "0.jsonl"
        if chance < 0.12:
            journal.write_bytes(journal.read_bytes()[:-4])
        if chance < 0.2:
            raise KilledError

    monkeypatch.setattr(WorkFolder, "note", dying)
    while True:
        try:
            found = in_shards(tmp_path, rows, options)
            break
        except KilledError:
            kills += 1
    assert kills > 2
    assert np.array_equal(found, in_memory(rows, options))


def several(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    rows = persons(400)
    inverted._FEWEST_IN_A_LIST, inverted._MOST_VISITED = 4, 1.0
    for search_ in SEARCHES:
        work = Path(folder) / search_
        options = ShardSettings(10, 3, block_rows=40, search=search_)
        for left in (7, 20, None):
            try:
                shards = Shards(WorkFolder(work, rank), quiet, left)
                labels = cluster_in_shards(shards, rows, options)
            except BlocksDone:
                assert left
        np.save(f"{folder}/{search_}-{rank}.npy", labels)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_blocks(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverted, "_FEWEST_IN_A_LIST", 4)
    monkeypatch.setattr(inverted, "_MOST_VISITED", 1.0)
    for search_ in SEARCHES:
        (tmp_path / search_).mkdir()
    start_processes(
        several, (world_size, str(tmp_path)), nprocs=world_size, start_method="forkserver"
    )
    for search_ in SEARCHES:
        expected = in_memory(persons(400), ShardSettings(10, 3, search=search_))
        for rank in range(world_size):
            assert np.array_equal(np.load(tmp_path / f"{search_}-{rank}.npy"), expected)
            assert (tmp_path / search_ / "done" / f"{rank}.jsonl").stat().st_size > 0


@pytest.fixture
def all_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inverted file of lists of few rows, all of which are visited."""
    monkeypatch.setattr(inverted, "_FEWEST_IN_A_LIST", 4)
    monkeypatch.setattr(inverted, "_MOST_VISITED", 1.0)
    monkeypatch.setattr(inverted.Centres, "visits", lambda centres, *_: len(centres.norms))


@pytest.mark.usefixtures("all_lists")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("block_rows", [None, 70])
def test_all_lists_of_an_inverted_file_give_the_exact_labels(
    block_rows: int | None, half: bool, tmp_path: Path
) -> None:
    rows = persons(300)
    options = ShardSettings(10, 3, block_rows=block_rows, half_precision=half, search="ivf")
    found, stops = with_stops(tmp_path, rows, options, left=2)
    assert stops > 5
    assert np.array_equal(found, in_memory(rows, ShardSettings(10, 3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "labels.npy"]
    assert '"round-' not in (tmp_path / "done" / "0.jsonl").read_text()


@pytest.mark.parametrize("block_rows", [None, 333])
def test_an_inverted_file_on_disk_is_that_in_memory(
    block_rows: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = persons(3000, noise=0.2)
    options = ShardSettings(10, 3, block_rows=block_rows, search="ivf")
    with caplog.at_level("INFO", inverted.__name__):
        expected, found = in_memory(rows, options), in_shards(tmp_path, rows, options)
    assert np.array_equal(found, expected)
    in_memory_, on_disk = (text for text in caplog.messages if "inverted file" in text)
    assert in_memory_ == on_disk
    assert "of the neighbours of 512 rows" in on_disk


@pytest.mark.parametrize("block_rows", [None, 400])
def test_equal_rows_in_an_inverted_file(block_rows: int | None, tmp_path: Path) -> None:
    rows = np.concatenate((np.repeat(persons(1), 900, 0), persons(300)))
    options = ShardSettings(10, 3, block_rows=block_rows, search="ivf")
    assert np.array_equal(in_shards(tmp_path, rows, options), in_memory(rows, options))


def test_the_search_is_exact_where_many_lists_would_be_visited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, options = persons(300, noise=5.0), ShardSettings(10, 3, block_rows=80, search="ivf")
    with caplog.at_level("INFO", inverted.__name__):
        with pytest.raises(BlocksDone):
            in_shards(tmp_path, rows, options, left=9)
        found = in_shards(tmp_path, rows, options)
    assert [text.endswith("so all are compared") for text in caplog.messages] == [True]
    assert np.array_equal(found, in_memory(rows, ShardSettings(10, 3)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.data())
def test_dbscan_of_blocks(count: int, least: int, itself: bool, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    there = np.triu(rng.random((count, count)) < 2 / count)
    dense = np.where(there | there.T, np.maximum(values := rng.random((count, count)), values.T), 2)
    rows = [np.flatnonzero(line < 2).astype(np.int32) for line in dense]

    def block(first: int, last: int) -> Rows:
        starts = np.cumsum([0, *map(len, rows[first:last])])
        data = [dense[i, rows[i]] for i in range(first, last)]
        return Rows(starts, np.concatenate(rows[first:last]),
                    np.concatenate(data).astype(np.float32), (last - first, count))  # fmt: skip

    cut = data.draw(st.integers(1, count))
    edges = [(start, min(start + cut, count)) for start in range(0, count, cut)]
    expected = dbscan(block(0, count), 0.5, least, always_itself=itself)
    found = dbscan_of_blocks(
        lambda: (block(*edge) for edge in edges), count, 0.5, least, always_itself=itself
    )
    assert np.array_equal(found, expected)


@pytest.mark.oracle
def test_labels_of_the_authors(oracle_dir: Path, tmp_path: Path) -> None:
    files = sorted(oracle_dir.glob("cluster_*.npz"))
    assert files
    checked = 0
    for path in files:
        arrays = np.load(path)
        for name in arrays.files:
            if name.startswith("cluster_label_k1_"):
                parts = name.split("_")
                k1, k2, eps = int(parts[3]), int(parts[5]), float(parts[7])
                folder = tmp_path / f"{path.stem}{name}"
                folder.mkdir()
                rows = np.ascontiguousarray(arrays["feature"], np.float32)
                found = in_shards(folder, rows, ShardSettings(k1, k2, eps, 4, block_rows=150))
                assert np.array_equal(found, arrays[name]), f"{path}: {name}"
                checked += 1
    assert checked


def test_a_share_of_the_rounds_is_enough_to_measure(tmp_path: Path) -> None:
    rows, options = persons(300), ShardSettings(10, 3, block_rows=50)
    shards = Shards(WorkFolder(tmp_path), quiet, share=0.5)
    labels = cluster_in_shards(shards, rows, options)
    assert [name for name in shards.seconds if name.startswith("round")] == [
        "round-1", "round-2", "round-3",
    ]  # fmt: skip
    assert shards.seconds.keys() >= {"lists", "distances", "labels"}
    assert len(labels) == 300


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = persons(40)
    rows[7] *= 2
    with pytest.raises(ValueError, match="row 7: expected a vector of length 1, got 2"):
        in_shards(tmp_path, rows, ShardSettings())
    rows[6, 0] = np.nan
    with pytest.raises(ValueError, match="row 6: expected finite numbers"):
        in_shards(tmp_path, rows, ShardSettings())
    with pytest.raises(ValueError, match="k2: expected 1 or more, got 0"):
        ShardSettings(k2=0)
    with pytest.raises(ValueError, match="eps: expected 0 < eps < 1, got 1"):
        ShardSettings(eps=1.0)
    with pytest.raises(ValueError, match="search: expected exact or ivf, got 'hnsw'"):
        ShardSettings(search="hnsw")  # type: ignore[arg-type]

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"half_norms.npy: cannot be written \(No space left"):
        in_shards(tmp_path, persons(40), ShardSettings())
