"""YAML of unknown origin as plain values, within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from reid.files import read_text

_MOST_CHARACTERS = 2**20
_MOST_BYTES = 4 * _MOST_CHARACTERS  # in UTF-8
_MOST_VALUES = 100_000
_VALUE_LENGTH = 64  # characters; longer words count as several values
_MOST_LEVELS = 50
_MOST_DIGITS = 40
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Plain values alone, as deep as a person would write them, and each key once."""

    _levels = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self._levels >= _MOST_LEVELS:
            raise yaml.YAMLError(f"values lie more than {_MOST_LEVELS} levels deep")
        self._levels += 1
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:  # 1:1:1:... takes time by the square of its length
            raise yaml.YAMLError(f"{node.value[:_MOST_DIGITS]}... has too many digits for a number")
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """The values that YAML text stands for: mappings, lists, words, numbers, dates.

    Unlike in `yaml.safe_load`, a small text cannot become huge values (aliases of aliases), and a
    key that appears twice in a mapping is an error, since one of the two would be lost.

    Raises:
        yaml.YAMLError: The text is not YAML, has a tag for values that are not plain, a key twice,
            more than a MiB, 50 levels or 100,000 values (aliases written out), or contains itself.
    """
    if text.startswith("\ufeff"):  # the file's first mark is gone; PyYAML would drop another
        raise yaml.YAMLError("it begins with a second byte order mark")
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {_MOST_CHARACTERS:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML raises these if a value does not fit its tag: `!!int x`, `!!bool x`, 2024-13-45
        raise yaml.YAMLError(f"a value is not what its tag or form says ({error})") from error
    finally:
        loader.dispose()


def read_yaml(path: Path) -> Any:
    """The values in a YAML file, as `parse_yaml` gives them.

    Raises:
        InputError: The file cannot be read, is too large, or is not UTF-8 text.
        yaml.YAMLError: See `parse_yaml`.
    """
    return parse_yaml(read_text(path, _MOST_BYTES))


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of values in a node, with aliases written out; each node is visited once."""
    place = id(node)
    if place in known:
        count = known[place]
        if count is None:
            raise yaml.YAMLError(f"an alias names a value that contains it{node.start_mark}")
        return count
    known[place] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            inner += (key, value)
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"the key {key.value!r} appears twice{key.start_mark}")
                keys.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    count = 1 + len(node.value) // _VALUE_LENGTH if isinstance(node, yaml.ScalarNode) else 1
    for child in inner:
        count += _count(child, known)
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases it has more than {_MOST_VALUES:,} values")
    known[place] = count
    return count
