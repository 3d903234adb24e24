"""Imports plug-ins: packages that register parts when they are imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec

from reid.assembly import parts  # noqa: F401  (registers the core's parts)
from reid.config import Config
from reid.projects import MOVED
from reid.registry import ConfigError


def register_parts(config: Config) -> None:
    """Imports the packages of `plugins`, and the projects of parts that moved out of the core.

    Raises:
        ConfigError: A package is not installed.
    """
    import_plugins(config.plugins)
    for project in sorted({MOVED[name] for name in _part_names(asdict(config)) if name in MOVED}):
        importlib.import_module(f"reid.projects.{project}")


def import_plugins(names: Sequence[str]) -> None:
    """Imports packages, which registers their parts.

    The name `tmgf` means the project `reid.projects.tmgf` if it exists, else the package `tmgf`.

    Raises:
        ConfigError: A package is not installed.
    """
    for name in names:
        project = f"reid.projects.{name}"
        module = project if "." not in name and find_spec(project) else name
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
            raise ConfigError(
                f"plugins: found no package {name!r}; install it, or put its folder on PYTHONPATH"
            ) from error


def _part_names(tree: object) -> Iterator[str]:
    """The names of all parts in a config, including parts inside parts."""
    if isinstance(tree, Mapping):
        if isinstance(tree.get("name"), str):
            yield tree["name"]
        for value in tree.values():
            yield from _part_names(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            if isinstance(item, str):
                yield item
            yield from _part_names(item)
