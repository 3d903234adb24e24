"""Records where results come from, and compares a run's settings with new ones."""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from reid import distributed
from reid.config import Config, config_differences, dump_config, load_config
from reid.engine.logs import device_name

LIBRARIES = (
    "reid", "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "numba", "faiss-cpu",
    "pillow",
)  # fmt: skip
"""Libraries that results depend on."""
BOOKKEEPING = (
    "output_dir", "device", "log_period", "checkpoint_period", "checkpoint_keep",
    "dataloader.num_workers", "dataloader.cache", "process_timeout", "test.ranked_lists",
)  # fmt: skip
"""Settings that do not change the results."""
_FREE_ON_RESUME = (
    *BOOKKEEPING, "test", "datasets.test", "dataloader.on_error", "on_collapse",
    "solver.on_nonfinite", "solver.max_skipped",
)  # fmt: skip
"""Settings that do not change how training goes on, so a resumed run may change them."""
_BOUND_ON_RESUME = ("test.precision",)
"""Exceptions to the list above: clusters depend on them."""


def provenance(
    config: Config, device: torch.device, data: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that somebody needs to repeat a run.

    Args:
        config: The run's config.
        device: The run's device.
        data: The content of each split of each data set, from `count_splits`.

    Returns:
        `git`: `commit` and `dirty` (whether tracked files differ from the commit), or None outside
        a repository; `config_hash` (see `config_hash`); `data`; `seed`; `device`, `processes`,
        `python` and `libraries` with their versions; `date` in UTC.
    """
    return {
        "git": git_state(),
        "config_hash": config_hash(config),
        "data": [*data],
        "seed": config.seed,
        "device": device_name(device),
        "processes": distributed.world_size(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def config_hash(config: Config) -> str:
    """SHA-256 of all settings except `BOOKKEEPING`: the same for all runs of an experiment."""
    settings = asdict(config)
    for key in BOOKKEEPING:
        *parents, last = key.split(".")
        node = settings
        for parent in parents:
            node = node[parent]
        del node[last]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def git_state() -> dict[str, Any] | None:
    """The commit of the repository that holds this code, and whether files differ from it.

    None if this code is not in a repository, as after an installation, or if git is missing.
    """
    source = Path(__file__)
    try:
        _git(source, "ls-files", "--error-unmatch", source.name)
        return {
            "commit": _git(source, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(source, "status", "--porcelain", "--untracked-files=no", ":/")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def config_diff(stored: Path, config: Config) -> tuple[str, bool]:
    """Compares a run's config.yaml with the config that it is resumed with.

    Args:
        stored: The run's config.yaml. Settings missing from it count as their defaults.
        config: The present config.

    Returns:
        A unified diff, empty if nothing differs; and whether the difference changes training.

    Raises:
        ConfigError: The file is missing or broken.
    """
    before = load_config(stored)
    lines = difflib.unified_diff(
        dump_config(before).splitlines(),
        dump_config(config).splitlines(),
        str(stored),
        "this command",
        lineterm="",
        n=2,
    )
    free = all(
        key not in _BOUND_ON_RESUME
        and any(key == name or key.startswith(f"{name}.") for name in _FREE_ON_RESUME)
        for key in config_differences(before, config)
    )
    return "\n".join(lines), not free


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
