"""Values checked against type annotations: the schema of settings and of parts' options."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from reid.other_frameworks import our_key

T = TypeVar("T")
Inner = Mapping[type, Callable[[object, str], Any]]
"""Interface of a part -> a function of the part's spec and the spec's key."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # no encoding and no file name has these


class ConfigError(ValueError):
    """A setting is wrong: names the key, what came, what was expected."""


class Rule:
    """A condition that `Annotated[T, Rule(...)]` puts on a value of type T.

    Args:
        expected: Completes the message `expected ..., got 3`.
        accepts: Whether a value of type T is right; never called with None.
        prepare: Turns a short way of writing the value into a T, before the type is checked.
    """

    def __init__(
        self,
        expected: str = "",
        accepts: Callable[[Any], bool] = lambda value: True,
        prepare: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.expected = expected
        self.accepts = accepts
        self.prepare = prepare


class Range(Rule):
    """The bounds of a number; NaN is outside every range.

    Args:
        low: The smallest number.
        high: The largest number.
        above: The number must be above `low`.
        below: The number must be below `high`.
    """

    def __init__(
        self, low: float, high: float, *, above: bool = False, below: bool = False
    ) -> None:
        first, last = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (low, high))
        start = f"above {first} and up" if above else f"from {first}"
        super().__init__(
            f"a number {start} to {'below ' if below else ''}{last}",
            lambda value: (
                (low < value if above else low <= value)
                and (value < high if below else value <= high)
            ),
        )


_INT = Range(-(2**63), 2**63 - 1)
_FLOAT = Rule("a finite number", math.isfinite)


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint such as ` (did you mean 'DBSCAN'?)`, or an empty string.

    The hint puts `prefix` before the name; similarity does not depend on it.

    >>> nearest("smapler", ["sampler", "loss"])
    " (did you mean 'sampler'?)"
    """
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower()[:100], by_lower, n=1)
    return f" (did you mean {prefix + by_lower[found[0]]!r}?)" if found else ""


def list_hint(value: object) -> str:
    """A hint where a list was written as a tuple of Python, as other frameworks have it.

    >>> list_hint("('Market1501',)")
    "; write a list as ['Market1501']"
    """
    if not isinstance(value, str) or not re.fullmatch(r"\([^()]{1,200}\)", value.strip()):
        return ""
    return f"; write a list as [{value.strip()[1:-1].strip().rstrip(',')}]"


def shortened(value: object, most: int = 200) -> str:
    """`repr(value)`, cut where it would fill a screen.

    >>> shortened("a" * 99, most=8)
    "'aaaaaaa... (101 characters)"
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def check_type(
    value: object, annotation: object, where: str, inner: Inner = MappingProxyType({})
) -> Any:
    """`value`, checked against a type annotation; ints pass as floats, lists as tuples.

    Numbers that YAML 1.1 reads as text (`1e-5`) pass as floats, and the words `on` and `off`, which
    it reads as booleans, where they are choices. Without a `Range`, integers have 64 bits and
    floats are finite.

    Args:
        value: Plain values, as YAML gives them.
        annotation: A type, union, `Literal`, dataclass, interface in `inner`, list, tuple or
            mapping of these, or `Annotated` with a `Rule`.
        where: The key, for messages.
        inner: Functions for the specs of parts inside the value.

    Raises:
        ConfigError: The value is of another type, or outside its bounds.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    rules: tuple[Rule, ...] = ()
    if origin is Annotated:
        annotation, *extras = arguments
        rules = tuple(extra for extra in extras if isinstance(extra, Rule))
        for rule in rules:
            value = rule.prepare(value)
        origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float) and not any(isinstance(rule, Range) for rule in rules):
        rules = (*rules, _INT if annotation is int else _FLOAT)
    if origin in (Union, types.UnionType):
        checked = _check_union(value, annotation, where, inner)
    elif origin is Literal:
        checked = _check_choice(value, arguments, where)
    elif origin is not None:
        checked = _check_items(value, annotation, where, inner)
    elif isinstance(annotation, type) and annotation in inner:
        checked = inner[annotation](value, where)
    elif isinstance(annotation, type) and is_dataclass(annotation):
        checked = from_mapping(annotation, value, where)
    else:
        checked = _check_scalar(value, annotation, where)
    for rule in rules:
        if checked is not None and not rule.accepts(checked):
            raise ConfigError(f"{where}: expected {rule.expected}, got {shortened(value)}")
    return checked


def _wrong(value: object, annotation: object, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: expected {type_name(annotation)}, got {shortened(value)} "
        f"({type(value).__name__}){list_hint(value)}"
    )


def _check_union(value: object, annotation: object, where: str, inner: Inner) -> Any:
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    if value is None and len(choices) < len(get_args(annotation)):
        return None
    for choice in choices:
        try:
            return check_type(value, choice, where, inner)
        except ConfigError:
            if len(choices) == 1:
                raise
    raise _wrong(value, annotation, where)


def _check_choice(value: object, choices: tuple[Any, ...], where: str) -> Any:
    word = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else None
    for choice in (value, word):
        if choice in choices and type(choice) in {type(known) for known in choices}:
            return choice
    raise ConfigError(
        f"{where}: expected one of {', '.join(map(repr, choices))}, got {shortened(value)}"
        + nearest(str(value)[:100], map(str, choices))
    )


def _check_items(value: object, annotation: object, where: str, inner: Inner) -> Any:
    """A list, tuple or mapping."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            check_type(key, arguments[0], f"{where}, key"): check_type(
                item, arguments[1], f"{where}.{key}", inner
            )
            for key, item in value.items()
        }
    if origin not in (list, Sequence, tuple) or not isinstance(value, (list, tuple)):
        raise _wrong(value, annotation, where)
    kinds: Iterable[object] = [arguments[0]] * len(value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise _wrong(value, annotation, where)
        kinds = arguments
    items = [
        check_type(item, kind, f"{where}[{i}]", inner)
        for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return items if origin is list else tuple(items)


def _check_scalar(value: object, annotation: object, where: str) -> Any:
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise ConfigError(f"{where}: text must not hold NUL or surrogates, got {shortened(value)}")
    if annotation in (Any, object, inspect.Parameter.empty):
        return value
    if annotation is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):  # not a number, or too large for a float
            raise _wrong(value, annotation, where) from None
    if annotation is None and value is None:
        return None
    right = isinstance(annotation, type) and isinstance(value, annotation)
    if not right or (annotation is int and isinstance(value, bool)):
        raise _wrong(value, annotation, where)
    return value


def from_mapping(schema: type[T], tree: object, where: str = "") -> T:
    """A dataclass from a mapping, with each value checked against its field's annotation.

    Args:
        schema: The dataclass.
        tree: Field names -> plain values.
        where: The key of the mapping, for messages; empty: it is the whole file.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected KEY: VALUE lines, got {shortened(tree)}")
    prefix = f"{where}." if where else ""
    hints = _hints(schema)
    known = [prefix + name for name in hints]
    for key, value in tree.items():
        if key not in hints:
            full = f"{prefix}{shortened(key, 100)[1:-1] if isinstance(key, str) else key}"
            near = nearest(str(key), hints, prefix)  # the section's name would make all alike
            hint = our_key(full, value) or near or f"; known: {', '.join(known)}"
            raise ConfigError(f"{full}: unknown key{hint}")
    for field in fields(schema):  # type: ignore[arg-type]
        if field.name not in tree and field.default is field.default_factory is MISSING:
            raise ConfigError(f"{prefix}{field.name}: is missing")
    values = {}
    for key, value in tree.items():
        try:
            values[key] = check_type(value, hints[key], prefix + key)
        except ConfigError as error:
            if is_dataclass(hints[key]):
                raise
            raise ConfigError(f"{error}{our_key(prefix + key, value)}") from None
    return schema(**values)


def check_fields(instance: object, where: str = "") -> None:
    """Checks each field of a dataclass and replaces it with what `check_type` returns.

    Raises:
        ConfigError: A value is wrong.
    """
    for name, annotation in _hints(type(instance)).items():
        key = f"{where}.{name}" if where else name
        value = getattr(instance, name)
        if not is_dataclass(value):
            setattr(instance, name, check_type(value, annotation, key))


def type_name(annotation: object) -> str:
    """An annotation as values look in YAML, without its rules.

    >>> type_name(list[int]), type_name(tuple[float, float]), type_name(Mapping[str, float])
    ('[int, ...]', '[float, float]', '{str: float, ...}')
    >>> type_name(Sequence[Literal["channels", "positions"]])
    "['channels' | 'positions', ...]"
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if annotation is None or annotation is type(None):
        return "null"
    if annotation is Ellipsis:
        return "..."
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    names = [type_name(argument) for argument in arguments]
    if origin in (Union, types.UnionType):
        return " | ".join(names)
    if origin is tuple:
        return f"[{', '.join(names)}]"
    if origin in (list, Sequence):
        return "a list" if names == ["Any"] else f"[{names[0]}, ...]"
    if origin in (dict, Mapping):
        return "{KEY: VALUE, ...}" if names[1] == "Any" else f"{{{': '.join(names)}, ...}}"
    if names and isinstance(origin, type):
        return f"{origin.__name__}[{', '.join(names)}]"
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _hints(schema: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in fields(schema)}
