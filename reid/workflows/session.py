"""The frame of every run: device, processes, logs, signals, and torch's errors explained."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from reid import distributed
from reid.assembly.network import pick_device
from reid.config import Config
from reid.engine.logs import environment, run_logging
from reid.engine.stopping import Interrupted, StopSignals
from reid.locks import FolderInUse, locked
from reid.registry import ConfigError
from reid.structures import DataError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@contextmanager
def alone_in(output_dir: Path, key: str = "output_dir") -> Iterator[None]:
    """Locks the output folder for this run; only the main process takes the lock.

    Args:
        output_dir: The folder.
        key: The setting that gave it, for messages.

    Raises:
        ConfigError: Another run writes to the folder.
        OutputError: The folder cannot be written to.
    """
    if distributed.is_started_beside_main():
        yield
        return
    try:
        with locked(output_dir):
            yield
    except FolderInUse as error:
        raise ConfigError(f"{key}: {error}") from None


@contextmanager
def started(config: Config, log: str = "log.txt") -> Iterator[tuple[torch.device, StopSignals]]:
    """Sets up device, processes, logs and signal handlers, and ends them after the block."""
    end_with_launcher()
    device = pick_device(config.device)
    # Entered twice: a second worker may die while we report the first.
    with StopSignals() as signals, explained(signals):
        distributed.init_process_group(device, timedelta(minutes=config.process_timeout))
        try:
            with run_logging(Path(config.output_dir), log), explained(signals):
                logger.info("Environment\n%s", environment(device))
                yield device, signals
        finally:
            distributed.destroy_process_group()


def end_with_launcher() -> None:
    """Asks Linux to send this process SIGTERM when its launcher, torchrun, dies."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tells_of_dead_worker(error: Exception) -> bool:
    """Whether an error of torch's loader means that one of its workers has died."""
    if isinstance(error, (ConnectionError, EOFError)):
        frames = traceback.walk_tb(error.__traceback__)
        return any(frame.f_globals["__name__"] == DataLoader.__module__ for frame, _ in frames)
    return "DataLoader worker (pid" in str(error) and not isinstance(error, DataError)


@contextmanager
def explained(signals: StopSignals) -> Iterator[None]:
    """Turns some errors of torch into errors that say what to do."""
    try:
        yield
    except Exception as error:
        dead_worker = _tells_of_dead_worker(error)
        # A signal to the whole group may kill a worker before it reaches us.
        if signals.came(within_s=1.0 if dead_worker else 0.0):
            raise Interrupted(signals.signum) from error
        if dead_worker:
            raise DataError(
                f"a process that reads images has died ({error}). The usual cause is too little "
                "memory or shared memory (/dev/shm): lower dataloader.num_workers; 0 reads in the "
                "main process. --resume goes on from the last checkpoint"
            ) from error
        if str(error).startswith("Expected more than 1 value per channel"):
            raise ConfigError(
                "dataloader.sampler.batch_size: a batch of one image whose feature map has one "
                f"position gives BatchNorm no variance ({error}); use larger batches, or a larger "
                "input.size"
            ) from error
        if isinstance(error, DataError) and str(error).startswith("Caught DataError"):
            # torch puts the worker's traceback before the message, which alone helps a user.
            raise DataError(str(error).rpartition("DataError: ")[2].rstrip()) from error
        raise
