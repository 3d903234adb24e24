"""The registries, and `build`: from a name with options to a part, checked by its own signature."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from fvcore.common.registry import Registry

BACKBONE = Registry("BACKBONE")
HEAD = Registry("HEAD")
LOSS = Registry("LOSS")
CLUSTERER = Registry("CLUSTERER")
LABELLER = Registry("LABELLER")
EVALUATOR = Registry("EVALUATOR")
DATASET = Registry("DATASET")
SAMPLER = Registry("SAMPLER")
HOOK = Registry("HOOK")
TRANSFORM = Registry("TRANSFORM")

PART_OF: dict[type, Registry] = {}
"""Interface of a part -> the registry that builds it, filled where the interface is defined.

An option with such an annotation takes a spec, which is built like any other.
"""


class Hook:
    """What is registered in HOOK: something to do at the points of the training loop.

    `trainer` is a `reid.engine.trainer.Trainer`.

    The whole loop::

        hook.before_train(trainer)
        for trainer.epoch in range(trainer.epoch, trainer.max_epochs):
            hook.before_epoch(trainer)
            for batch in trainer.loader:
                trainer.run_step(batch)
                hook.after_step(trainer)
            hook.save(trainer)
            hook.after_epoch(trainer)
        hook.after_train(trainer)

    or, where a signal or an error ends it before that, ::

        hook.on_break(trainer)

    From `save` on, `trainer.epoch` is the number of finished epochs. A run that is resumed begins
    with `before_train` and the `after_epoch` of the epoch that was saved. Hooks are called in the
    order of the list, and a hook with state of its own returns it from `state_dict`.
    """

    def before_train(self, trainer: Any) -> None:
        """Once, before the first epoch."""

    def before_epoch(self, trainer: Any) -> None:
        """Before each epoch; the sampler's epoch is set, its labels may be changed here."""

    def after_step(self, trainer: Any) -> None:
        """After each batch; `trainer.losses` holds its losses, nothing if it was skipped."""

    def save(self, trainer: Any) -> None:
        """After the last step of each epoch, in one piece with it: no signal comes between."""

    def after_epoch(self, trainer: Any) -> None:
        """After each epoch, and once more where a run is resumed after it."""

    def after_train(self, trainer: Any) -> None:
        """Once, after the last epoch; not called when training ends in an error."""

    def on_break(self, trainer: Any) -> None:
        """Once, when a signal or an error ends training, perhaps in the middle of a hook.

        Other processes may be gone: nothing may be asked of them here.
        """

    def state_dict(self) -> dict[str, Any]:
        """State to keep in checkpoints: numbers, strings, tensors, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class ConfigError(ValueError):
    """A setting is wrong: names the key, what came, what was expected."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'DBSCAN'?)`, or nothing if nothing is near.

    >>> nearest("smapler", ["sampler", "loss"])
    " (did you mean 'sampler'?)"
    """
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""


def shortened(value: object, most: int = 200) -> str:
    """`repr(value)`, cut where it would fill a screen.

    >>> shortened("a" * 99, most=8)
    "'aaaaaaa... (101 characters)"
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def build(registry: Registry, spec: object, where: str, **runtime: object) -> Any:
    """Builds the part that `spec` names, with the part's own signature as the schema.

    Args:
        registry: Where the name is looked up.
        spec: A mapping with `name` and options, or just the name.
        where: The key of `spec` in the config, for messages: `model.backbone`.
        **runtime: Facts that come from data or from other parts (number of cameras, of
            identities). A part takes those that its signature names; they cannot be set in the
            config.

    Raises:
        ConfigError: An unknown name, an unknown or missing option, a wrong type, or a value that
            the part itself refuses (its `ValueError`).
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(
            f"{where}: expected a NAME with options, e.g. {{NAME: ...}}; got {spec!r}"
        )
    options = {str(key): value for key, value in spec.items() if key != "name"}
    name = spec["name"]
    known = sorted(key for key, _ in registry)
    if name not in registry:
        raise ConfigError(
            f"{where}.name: {name!r} is not registered in {registry._name}{nearest(name, known)}; "
            f"known: {', '.join(known) or 'none'}. Is the package that registers it in PLUGINS?"
        )
    part = registry.get(name)
    parameters = _parameters(part)
    for key in options:
        if key in runtime and key in parameters:
            raise ConfigError(
                f"{where}.{key}: comes from the data or another part, remove it from the config"
            )
        if key not in parameters:
            choices = [other for other in parameters if other not in runtime]
            raise ConfigError(
                f"{where}.{key}: {name} has no such option{nearest(key, choices)}; "
                f"options: {', '.join(choices) or 'none'}"
            )
    arguments: dict[str, object] = {key: runtime[key] for key in parameters if key in runtime}
    for key, (annotation, required) in parameters.items():
        if key in options and annotation in PART_OF:
            inner = PART_OF[annotation]
            arguments[key] = build(inner, options[key], f"{where}.{key}", **runtime)
        elif key in options:
            arguments[key] = check_type(options[key], annotation, f"{where}.{key}")
        elif required and key not in arguments:
            raise ConfigError(
                f"{where}.{key}: {name} needs this option ({type_name(annotation)}), it is missing"
            )
    try:
        return part(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where} ({name}): {error}") from error


def check_type(value: object, annotation: object, where: str) -> Any:
    """`value`, checked against a type annotation; ints pass as floats, lists as tuples.

    Numbers that YAML 1.1 reads as text (`1e-5`) pass as floats.

    Raises:
        ConfigError: The value is of another type.
    """

    def wrong() -> ConfigError:
        return ConfigError(
            f"{where}: expected {type_name(annotation)}, got {shortened(value)} "
            f"({type(value).__name__})"
        )

    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return value
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return check_type(value, option, where)
            except ConfigError:
                continue
        raise wrong()
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise ConfigError(
            f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}"
            + nearest(str(value), map(str, arguments))
        )
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise wrong()
    if annotation is float:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise wrong() from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise wrong()
    if annotation is int and isinstance(value, bool):
        raise wrong()
    if origin in (list, Sequence, tuple):
        if not isinstance(value, (list, tuple)):
            raise wrong()
        if origin is tuple and arguments[-1] is not Ellipsis:
            if len(arguments) != len(value):
                raise wrong()
            inner: Iterable[object] = arguments
        else:
            inner = [arguments[0]] * len(value)
        items = [
            check_type(item, kind, f"{where}[{i}]")
            for i, (item, kind) in enumerate(zip(value, inner, strict=True))
        ]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong()
        return {
            key: check_type(item, arguments[1], f"{where}.{key}") for key, item in value.items()
        }
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise wrong()


def type_name(annotation: object) -> str:
    """An annotation as a reader would write it.

    >>> type_name(list[int])
    'list[int]'
    """
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _parameters(part: Callable[..., object]) -> dict[str, tuple[object, bool]]:
    """Option name -> (type, required) of a class or function.

    The options of a class whose constructor takes `**options` are its own and those of its base,
    without the base's that it sets itself (`fixed_options`).
    """
    function = part.__init__ if inspect.isclass(part) else part
    hints = typing.get_type_hints(function)
    listed = inspect.signature(part).parameters.values()
    options = {
        parameter.name: (hints.get(parameter.name, Any), parameter.default is parameter.empty)
        for parameter in listed
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if inspect.isclass(part) and any(item.kind is item.VAR_KEYWORD for item in listed):
        fixed = getattr(part, "fixed_options", ())
        inherited = _parameters(part.__mro__[1])
        return options | {k: v for k, v in inherited.items() if k not in {*options, *fixed}}
    return options
