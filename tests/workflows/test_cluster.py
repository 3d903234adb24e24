"""A file of features is clustered by the command, with any number of processes, after any kill."""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reid.engine.stopping import TimeIsUp
from reid.evaluation.feature_rows import FeatureRows, write_feature_rows
from reid.files import InputError, OutputError
from reid.labelling import JaccardDBSCAN
from reid.locks import locked
from reid.neighbors.kernels import Floats
from reid.neighbors.shards import ShardSettings
from reid.registry import ConfigError
from reid.structures import DataError, FeatureSet, PseudoLabels
from reid.workflows.cluster import cluster_file

ROOT = Path(__file__).parents[2]
OPTIONS = ShardSettings(k1=8, k2=3, block_rows=90)


def features(count: int = 240, noise: float = 0.5) -> Floats:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 16, generator=generator)
    rows = centres[torch.arange(count) % 20] + noise * torch.randn(count, 16, generator=generator)
    rows[::20] = rows[0]
    return F.normalize(rows, dim=1).numpy()


def expected(rows: Floats) -> np.ndarray:
    return JaccardDBSCAN(k1=8, k2=3)(FeatureSet.of(torch.from_numpy(rows))).cluster.numpy()


def labelled(rows: Floats) -> FeatureRows:
    count, camids = len(rows), np.arange(len(rows)) % 3
    texts = {name: [name] * count for name in ("paths", "cameras")}
    pids = np.full(count, -1)
    return FeatureRows(rows, **texts, splits=[""] * count, pids=pids, camids=camids, provenance={})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_of_extract_give_clusters_and_proxies(suffix: str, tmp_path: Path) -> None:
    rows = features()
    path, output = tmp_path / f"features{suffix}", tmp_path / "labels.csv"
    write_feature_rows(path, labelled(rows))
    found = cluster_file(path, tmp_path / "work", output, OPTIONS)
    clusters = expected(rows)
    header, *lines = output.read_text().splitlines()
    assert header == "row,cluster,proxy"
    table = np.array([[int(word) for word in line.split(",")] for line in lines])
    assert np.array_equal(table[:, 0], np.arange(240))
    assert np.array_equal(table[:, 1], clusters)
    proxies = PseudoLabels.from_clusters(torch.from_numpy(clusters), torch.arange(240) % 3).proxy
    assert np.array_equal(table[:, 2], proxies.numpy())
    outliers = int((clusters < 0).sum())
    assert str(found) == (
        f"{output}: {clusters.max() + 1} clusters of {240 - outliers} rows; {outliers} rows are "
        "outliers"
    )
    assert not list((tmp_path / "work").iterdir())


def test_cameras_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    np.savez(path, features=features(), camids=np.arange(239))
    with pytest.raises(DataError, match=r"camids: expected 240 numbers from -1.* got 239 from 0"):
        cluster_file(path, tmp_path / "work", tmp_path / "labels.csv", OPTIONS)


@pytest.mark.parametrize("kind", ["single", "half", "double", "columns"])
def test_arrays_of_any_precision(kind: str, tmp_path: Path) -> None:
    rows = features()
    if kind == "half":
        rows = rows.astype(np.float16)
    stored = {"double": rows.astype(np.float64), "columns": np.asfortranarray(rows)}.get(kind, rows)
    path, output = tmp_path / "features.npy", tmp_path / "labels.npy"
    np.save(path, stored)
    before = path.read_bytes()
    cluster_file(path, tmp_path / "work", output, OPTIONS)
    assert np.array_equal(np.load(output), expected(rows.astype(np.float32)))
    assert path.read_bytes() == before


def test_it_stops_when_told_and_goes_on(tmp_path: Path) -> None:
    path, output, work = tmp_path / "features.npy", tmp_path / "labels.npy", tmp_path / "work"
    np.save(path, features())
    with pytest.raises(TimeIsUp, match="as many blocks"):
        cluster_file(path, work, output, OPTIONS, stop_after=5)
    other = ShardSettings(k1=9, k2=3, block_rows=90)
    with pytest.raises(ConfigError, match=r"a run with other settings: .*'k1': 8.* now .*'k1': 9"):
        cluster_file(path, work, output, other)
    assert not output.exists()
    cluster_file(path, work, output, OPTIONS)
    assert np.array_equal(np.load(output), expected(features()))


def test_what_is_refused(tmp_path: Path) -> None:
    path, output, work = tmp_path / "features.npy", tmp_path / "labels.npy", tmp_path / "work"
    with pytest.raises(DataError, match=r"features.npy: cannot be read \(No such file"):
        cluster_file(path, work, output, OPTIONS)
    np.save(path, features())
    with pytest.raises(ConfigError, match=r"ends in .csv or .npy"):
        cluster_file(path, work, tmp_path / "labels.txt", OPTIONS)
    output.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        cluster_file(path, work, output, OPTIONS)
    output.unlink()
    (work / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"expected an empty folder.*'mine'"):
        cluster_file(path, work, output, OPTIONS)
    (work / "mine").rmdir()
    with pytest.raises(TimeIsUp):
        cluster_file(path, work, output, OPTIONS, stop_after=2)
    with (
        locked(work),
        pytest.raises(ConfigError, match=r"--work-dir: .*work is in use by process"),
    ):
        cluster_file(path, work, output, OPTIONS)
    np.save(path, features(noise=0.6))
    with pytest.raises(ConfigError, match="another file of features"):
        cluster_file(path, work, output, OPTIONS)
    with pytest.raises(OutputError, match="cannot be written"):
        cluster_file(path, path / "work", output, OPTIONS)


def test_what_would_be_lost_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    path, work = tmp_path / "features.npy", tmp_path / "work"
    np.save(path, features())
    (tmp_path / "link").symlink_to(work)
    work.mkdir()
    for output in (work / "labels.npy", tmp_path / "link" / "labels.npy"):
        with pytest.raises(ConfigError, match=r"labels.npy: expected the labels outside .*emptied"):
            cluster_file(path, work, output, OPTIONS)
    with pytest.raises(ConfigError, match=r"features.npy: expected features outside"):
        cluster_file(work / "features.npy", work, tmp_path / "labels.npy", OPTIONS)
    with pytest.raises(OutputError, match=r"labels.npy: cannot be written"):
        cluster_file(path, work, path / "labels.npy", OPTIONS)
    (tmp_path / "labels.npy").mkdir()
    with pytest.raises(OutputError, match=r"labels.npy: cannot be written \(it is a folder"):
        cluster_file(path, work, tmp_path / "labels.npy", OPTIONS, overwrite=True)
    assert not list(work.iterdir())


def test_numbers_that_mean_nothing(tmp_path: Path) -> None:
    for memory in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="memory: expected more than 0 bytes"):
            ShardSettings(memory=memory)
    for stop_after in (0, -3):
        with pytest.raises(ConfigError, match="--stop-after-blocks: expected 1 or more"):
            cluster_file(tmp_path / "features.npy", tmp_path / "work", tmp_path / "labels.npy",
                         OPTIONS, stop_after=stop_after)  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_folder_whose_note_is_broken(content: str, tmp_path: Path) -> None:
    path, work = tmp_path / "features.npy", tmp_path / "work"
    np.save(path, features())
    work.mkdir()
    (work / "clustering.json").write_text(content)
    with pytest.raises(ConfigError, match=r"clustering.json: .*choose another folder"):
        cluster_file(path, work, tmp_path / "labels.npy", OPTIONS)


@pytest.mark.parametrize("name", ["norms.npy", "candidates-000000/000000.npy"])
def test_a_folder_that_somebody_has_changed(name: str, tmp_path: Path) -> None:
    path, work, output = tmp_path / "features.npy", tmp_path / "work", tmp_path / "labels.npy"
    np.save(path, features())
    with pytest.raises(TimeIsUp):
        cluster_file(path, work, output, OPTIONS, stop_after=4)
    journal = work / "done" / "0.jsonl"
    journal.write_text(f"3\n{journal.read_text()}")  # not a note: passed over
    changed = work / name
    whole = changed.read_bytes()
    changed.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=rf"{name}: cannot be read .*; remove the folder"):
        cluster_file(path, work, output, OPTIONS)
    changed.write_bytes(whole)
    cluster_file(path, work, output, OPTIONS)
    assert np.array_equal(np.load(output), expected(features()))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected features as .npy"),
        (b"\x93NUMPY\x01\x00 broken", "cannot be read as features"),
        (b"PK\x03\x04 broken", "cannot be read as features"),
        (np.ones((4, 3)) * 2, "row 0: expected a vector of length 1, got 3.46"),
        (np.ones(4), "must be numbers"),
        (np.empty((0, 3)), "there is no feature"),
        (np.array([["a", "b"]]), "must be numbers"),
    ],
)
def test_broken_features(content: bytes | np.ndarray, told: str, tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DataError, match=told) as error:
        cluster_file(path, tmp_path / "work", tmp_path / "labels.npy", OPTIONS)
    assert str(path) in str(error.value)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.save("features.npy", features())
    words = ["cluster.py", "features.npy", "--work-dir", "work", "--output", "labels.npy",
             "--k1", "8", "--k2", "3"]  # fmt: skip
    main = runpy.run_path(str(ROOT / "tools" / "cluster.py"))["main"]
    monkeypatch.setattr(sys, "argv", [*words, "--stop-after-blocks", "4"])
    assert main() == 3
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    assert "240 rows of 16 numbers" not in capsys.readouterr().out  # that was told at first
    assert np.array_equal(np.load("labels.npy"), expected(features()))
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite", "--eps", "2"])
    assert main() == 2
    assert "eps: expected 0 < eps < 1, got 2.0" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main() == 2
    assert "expected all processes on one machine, got 4" in capsys.readouterr().err


@pytest.mark.slow
def test_real_processes_are_killed_and_go_on(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", features(6000, 0.9))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    random.seed(0)
    for attempt in range(60):
        processes = 1 + attempt % 2
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(processes), str(ROOT / "tools" / "cluster.py"),
                   "features.npy", "--work-dir", "work", "--output", "labels.npy", "--k1", "8",
                   "--k2", "3", "--memory-gb", "0.0004"]  # fmt: skip
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE,
                              text=True, start_new_session=True) as child:  # fmt: skip
            done = tmp_path / "work" / "done"
            begun = size_of(done)
            wait = random.uniform(0.0, 0.3 * attempt)
            while child.poll() is None and size_of(done) == begun:
                time.sleep(0.05)
            until = time.monotonic() + wait
            while child.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            _, told = child.communicate(timeout=300)
        if child.returncode == 0 or (tmp_path / "labels.npy").exists():
            break  # it may have been killed after its last act
        assert child.returncode == -signal.SIGKILL or "is in use by" in told, told
    assert attempt > 1
    assert np.array_equal(np.load(tmp_path / "labels.npy"), expected(features(6000, 0.9)))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))
