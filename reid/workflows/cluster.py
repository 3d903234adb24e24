"""Clusters a file of features in shards: on disk, by several processes, going on after a stop."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import torch

from reid import distributed
from reid.engine.logs import progress_bar
from reid.engine.stopping import StopSignals, TimeIsUp
from reid.evaluation.mapped_features import copy_features, map_features, read_camids
from reid.files import InputError, read_json, replacing, write_text, writing
from reid.locks import LOCK
from reid.neighbors.kernels import Floats, Labels
from reid.neighbors.shards import BlocksDone, Shards, ShardSettings, WorkFolder, cluster_in_shards
from reid.neighbors.shards.steps import ROWS, Step
from reid.registry import ConfigError
from reid.structures import OUTLIER, UNKNOWN_CAMERA, DataError, PseudoLabels
from reid.workflows.session import alone_in, end_with_launcher

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".npy")
_JOB = "clustering.json"
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Clustering:
    """What a clustering has written.

    Attributes:
        path: The file.
        count: Rows in it.
        clusters: How many clusters.
        outliers: Rows in none of them.
    """

    path: Path
    count: int
    clusters: int
    outliers: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.clusters:,} clusters of {self.count - self.outliers:,} rows; "
            f"{self.outliers:,} rows are outliers"
        )


def cluster_file(
    features: Path,
    work_dir: Path,
    output: Path,
    settings: ShardSettings,
    *,
    stop_after: int | None = None,
    overwrite: bool = False,
) -> Clustering | None:
    """Clusters the features of a file; every process of one machine calls it.

    Args:
        features: .npy, .npz or .safetensors; see `copy_features`. Unit vectors.
        work_dir: A folder for what is between; its content is removed at the end. It must be empty,
            or be that of a stopped run with the same features and settings, which goes on.
        output: .csv of row, cluster and, where the file knows cameras, proxy; or .npy of clusters.
            -1 = outlier.
        settings: Of the clustering.
        stop_after: Stop after so many blocks; None: at the end.
        overwrite: Replace an output that is there already.

    Returns:
        What was written; None on other processes than the main one.

    Raises:
        ConfigError: The output is there already, has another suffix, or lies in the folder, as the
            features must not either; the folder is in use, or holds something else; `stop_after` is
            below 1; or processes are on several machines.
        DataError: The file is missing or broken, or its rows are no unit vectors.
        OutputError: A file cannot be written.
        Interrupted: A signal came; finished blocks are kept.
        TimeIsUp: As many blocks as were wanted are done.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: is there already; choose another name, or pass --overwrite")
    for path, what in ((features, "features"), (output, "the labels")):
        if work_dir.resolve() in path.resolve().parents:
            raise ConfigError(
                f"{path}: expected {what} outside {work_dir}, which is emptied at the end"
            )
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"--stop-after-blocks: expected 1 or more, got {stop_after}")
    end_with_launcher()
    with StopSignals(), alone_in(work_dir, "--work-dir"), _processes():
        folder = distributed.run_on_main(lambda: _begin(features, work_dir, output, settings))
        shards = Shards(
            WorkFolder(folder, distributed.rank()), partial(progress_bar, unit="block"), stop_after
        )
        try:
            rows = _rows(features, shards)
            if distributed.is_main():
                _check_cameras(features, len(rows))
            labels = cluster_in_shards(shards, rows, settings)
        except BlocksDone:
            raise TimeIsUp("as many blocks as --stop-after-blocks wants are done") from None
        except ValueError as error:
            raise DataError(f"{features}: {error}") from error
        found = None
        if distributed.is_main():
            outliers = int((labels == OUTLIER).sum())
            found = Clustering(output, len(labels), int(labels.max()) + 1, outliers)
            _write(output, labels, read_camids(features))
            _empty(work_dir)
        distributed.barrier()
    return found


@contextmanager
def _processes() -> Iterator[None]:
    """Joins the processes, which share the machine's threads."""
    local = distributed.local_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) != local:
        raise ConfigError(
            f"expected all processes on one machine, got {os.environ['WORLD_SIZE']} of which "
            f"{local} are on this one; they share files that are mapped into memory, which other "
            "machines would not see change"
        )
    distributed.init_process_group(torch.device("cpu"), _LONGEST_WAIT)
    threads = numba.get_num_threads()
    numba.set_num_threads(max(1, threads // local))
    try:
        yield
    finally:
        numba.set_num_threads(threads)
        distributed.destroy_process_group()


def _begin(features: Path, work_dir: Path, output: Path, settings: ShardSettings) -> Path:
    """Checks that the folder is empty, or of a stopped run of the same job.

    Raises:
        ConfigError: It is not.
        DataError: There are no such features.
        OutputError: The output cannot be written.
    """
    _check_output(output)
    try:
        status = features.stat()
    except OSError as error:
        raise DataError(f"{features}: cannot be read ({error.strerror or error})") from error
    names = "k1", "k2", "eps", "min_samples", "search"
    job = {
        "features": {"bytes": status.st_size, "changed": status.st_mtime_ns},
        "settings": {name: asdict(settings)[name] for name in names},
    }
    path = work_dir / _JOB
    if not path.exists():
        others = [item.name for item in work_dir.iterdir() if item.name != LOCK]
        if others:
            raise ConfigError(
                f"{work_dir}: expected an empty folder, or that of a stopped run; it holds "
                f"{sorted(others)[0]!r}, and its content would be removed at the end"
            )
        write_text(path, json.dumps(job, indent=2) + "\n")
        return work_dir
    try:
        before = read_json(path)
    except (InputError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); choose another folder") from error
    if not isinstance(before, dict):
        raise ConfigError(f"{path}: is not the beginning of a run; choose another folder")
    for name, what in (("features", "another file of features"), ("settings", "other settings")):
        if before.get(name) != job[name]:
            raise ConfigError(
                f"{work_dir}: holds the beginning of a run with {what}: {before.get(name)}, now "
                f"{job[name]}; choose another folder, or remove this one to start anew"
            )
    logger.info("Going on with the finished blocks in %s", work_dir)
    return work_dir


def _check_output(output: Path) -> None:
    """Writes next to the output, so that hours of work do not end at a folder of others.

    Raises:
        OutputError: The output cannot be written.
    """
    with writing(output):
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = Path(os.path.realpath(output)).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _rows(features: Path, shards: Shards) -> Floats:
    """The features, mapped into memory; copied first where that is needed."""
    folder = shards.folder

    def room(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        folder.make("features", shape, np.float32)
        target: Floats = folder.array("features")
        return target

    rows = map_features(features)
    if rows is None:
        step = Step("features", "Copying features", 1, lambda _: copy_features(features, room))
        shards.run(step)
        rows = folder.array("features")
    return rows


def _check_cameras(features: Path, count: int) -> None:
    """Looks at the cameras before hours of work.

    Raises:
        DataError: They do not fit.
    """
    camids = read_camids(features)
    if camids is not None and (len(camids) != count or camids.min() < UNKNOWN_CAMERA):
        raise DataError(
            f"{features}: camids: expected {count:,} numbers from {UNKNOWN_CAMERA}, one for each "
            f"row, got {len(camids):,} from {camids.min()}"
        )


def _write(output: Path, labels: Labels, camids: npt.NDArray[np.int64] | None) -> None:
    """Writes the labels, in the order of the rows.

    Raises:
        OutputError: The file cannot be written.
    """
    columns, header = [labels], "row,cluster"
    if camids is not None:
        given = torch.from_numpy(np.array(labels)), torch.from_numpy(camids)
        columns.append(PseudoLabels.from_clusters(*given).proxy.numpy())
        header += ",proxy"
    with replacing(output) as temporary, temporary.open("wb") as file:
        if output.suffix == ".npy":
            np.save(file, labels)
            return
        file.write(f"{header}\n".encode())
        for first in range(0, len(labels), ROWS):
            part = [column[first : first + ROWS] for column in columns]
            numbers = np.arange(first, first + len(part[0]))
            np.savetxt(file, np.stack([numbers, *part], 1), "%d", ",")


def _empty(work_dir: Path) -> None:
    """Removes what the run has left in its folder."""
    with writing(work_dir):
        for item in [*work_dir.iterdir()]:
            if item.is_dir():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()
