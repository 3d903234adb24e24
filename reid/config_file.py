"""Settings as plain mappings: read from YAML with `_BASE_`, merged, set by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reid.checking import ConfigError, shortened
from reid.shipped import config_hint
from reid.yaml_text import parse_yaml, read_yaml

_MOST_LEVELS = 50


def read_settings(file: Path) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a file merged over those of its `_BASE_` files, with lower-case keys.

    Returns:
        The settings, and all files that were read.

    Raises:
        ConfigError: A file is missing, is not YAML, or is its own `_BASE_`.
    """
    layers: list[dict[str, Any]] = []
    readers: dict[Path, Path] = {}  # resolved -> as written
    path: Path | None = file
    while path is not None:
        if not _is_file(path):
            reader = next(reversed(readers.values()), None)
            raise ConfigError(
                f"config file {str(path)!r} does not exist"
                + (f", but {str(reader)!r} names it as _BASE_" if reader else config_hint(path))
            )
        if path.resolve() in readers:
            raise ConfigError(f"config file {str(path)!r} is its own _BASE_")
        readers[path.resolve()] = path
        try:
            content = read_yaml(path)
            if not isinstance(content, dict | None):
                raise ConfigError(f"expected KEY: VALUE lines, got {shortened(content)}")
            layer: dict[str, Any] = lower_keys(content or {})
            base = layer.pop("_base_", None)
            if not isinstance(base, str | None):
                raise ConfigError(f"expected a file as _BASE_, got {shortened(base)}")
            layers.append(layer)
            path = None if base is None else path.parent / Path(base).expanduser()
        except ConfigError as error:
            raise ConfigError(f"config file {str(path)!r}: {error}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from error
        except RuntimeError as error:  # expanduser raises it: there is no such user
            raise ConfigError(f"config file {str(path)!r}: _BASE_ {base!r}: {error}") from error
    settings: dict[str, Any] = {}
    for layer in reversed(layers):
        settings = merge(settings, layer)
    return settings, list(readers.values())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a NUL
        return False


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both mappings; `above` wins, and its part of another name as a whole."""
    if {"name"} <= below.keys() & above.keys() and below["name"] != above["name"]:
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, str) and isinstance(old, dict):
            value = {"name": value}  # a bare name: a part without options
        if isinstance(value, dict) and isinstance(old, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def read_pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values of `KEY VALUE KEY VALUE`; a value is YAML, its keys in lower case.

    Raises:
        ConfigError: A key has no value, is written as `KEY=VALUE`, or its value is not YAML.
    """
    for word in words[::2]:
        if "=" in word:
            raise ConfigError(f"{shortened(word)}: write {word.replace('=', ' ', 1)!r}, without =")
    if len(words) % 2:
        raise ConfigError(
            f"expected KEY VALUE pairs after the options, got {' '.join(words)!r}; "
            f"{words[-1]!r} has no value"
        )
    for key, text in zip(words[::2], words[1::2], strict=True):
        try:
            yield key, lower_keys(parse_yaml(text), key)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {shortened(text)} is not a YAML value ({error})") from error


def set_key(settings: dict[str, Any], dotted: str, value: object) -> dict[str, Any]:
    """The settings with one key set; items of lists have numbers: `CRITERION.0.SMOOTHING`.

    Raises:
        ConfigError: The key goes below a value that has no options, or names no item of a list.
    """
    keys = dotted.lower().split(".")
    if len(keys) > _MOST_LEVELS:
        raise ConfigError(f"{shortened(dotted)}: has more than {_MOST_LEVELS} levels")
    changed: dict[str, Any] = _set(settings, keys, value, dotted)
    return changed


def _set(node: Any, keys: Sequence[str], value: object, dotted: str) -> Any:
    """`node` with the value at `keys` below it; the node itself stays as it is."""
    if not keys:
        return value
    key, *deeper = keys
    if isinstance(node, list):
        if not (key.isdecimal() and len(key) < 9 and int(key) < len(node)):
            numbers = f"0 to {len(node) - 1}" if node else "but the list is empty"
            raise ConfigError(
                f"{dotted}: expected the number of an item, {numbers}; got {shortened(key)}"
            )
        items = list(node)
        items[int(key)] = _set(node[int(key)], deeper, value, dotted)
        return items
    if node is None:
        node = {}
    elif isinstance(node, str):
        node = {"name": node}
    elif not isinstance(node, dict):
        where = ".".join(dotted.lower().split(".")[: -len(keys)])
        raise ConfigError(f"{dotted}: {where} is {node!r}, which has no options")
    if keys == ["name"] and node.get("name") != value:
        return {"name": value}  # the old part's options would not fit the new one
    return {**node, key: _set(node.get(key), deeper, value, dotted)}


def lower_keys(value: Any, where: str = "") -> Any:
    """A YAML value with the keys of all its mappings in lower case.

    Args:
        value: Mappings, lists, text, numbers, booleans and nulls.
        where: The key of the value, for messages.

    Raises:
        ConfigError: A value is of another kind (a date, a reference `${...}`), or a key appears
            twice, in capitals and in small letters.
    """
    if isinstance(value, Mapping):
        lowered: dict[str, Any] = {}
        for key, item in value.items():
            name = str(key).lower()
            if name in lowered:
                raise ConfigError(f"{name}: the key appears twice, in capitals and small letters")
            lowered[name] = lower_keys(item, f"{where}.{name}" if where else name)
        return lowered
    if isinstance(value, list):
        return [lower_keys(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, str | bool | int | float | None):
        raise ConfigError(f"{where}: expected text, a number or a boolean, got {shortened(value)} "
                          f"({type(value).__name__})")  # fmt: skip
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{where}: references ${{...}} are not supported, write the value itself; "
            f"got {shortened(value)}"
        )
    return value


def upper_keys(value: Any) -> Any:
    """A value as YAML shows it: keys in capitals, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key).upper(): upper_keys(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [upper_keys(item) for item in value]
    return value
