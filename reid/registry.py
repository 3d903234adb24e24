"""The registries, and `build`: from a name with options to a part, checked by its own signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fvcore.common.registry import Registry

from reid.checking import (
    ConfigError,
    Range,
    Rule,
    check_type,
    list_hint,
    nearest,
    shortened,
    type_name,
)
from reid.other_frameworks import our_key

__all__ = [
    "BACKBONE", "CLUSTERER", "DATASET", "EVALUATOR", "HEAD", "HOOK", "LABELLER", "LOSS", "MAP",
    "PART_OF", "SAMPLER", "TRANSFORM", "ConfigError", "Hook", "Range", "Registry", "Rule", "build",
    "check_spec", "check_type", "nearest", "shortened", "type_name",
]  # fmt: skip

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
MAP = Registry("MAP")

PART_OF: dict[type, Registry] = {}
"""Interface of a part -> the registry that builds it, filled where the interface is defined.

An option annotated with such an interface takes a spec, which is checked and built like any other.
"""


class Hook:
    """What is registered in HOOK: something to do at the points of the training loop.

    `trainer` is a `reid.engine.trainer.Trainer`.

    The whole loop::

        hook.before_train(trainer)
        for trainer.epoch in range(trainer.epoch, trainer.max_epochs):
            if trainer.epoch == trainer.stage.start:
                hook.before_stage(trainer, ended)
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

    def before_stage(self, trainer: Any, ended: Any) -> None:
        """When a stage begins; a run without stages is one. Not where a run resumes within a stage.

        Args:
            trainer: Has the stage's criterion, optimization and loader already.
            ended: The criterion of the stage before; None in the first one.
        """

    def before_epoch(self, trainer: Any) -> None:
        """Before each epoch; the sampler's epoch is set, its labels may be changed here."""

    def after_step(self, trainer: Any) -> None:
        """After each batch; `trainer.losses` holds its losses, and is empty if it was skipped."""

    def save(self, trainer: Any) -> None:
        """Right after the last step of each epoch; no signal is handled between the two."""

    def after_epoch(self, trainer: Any) -> None:
        """After each epoch, and again when a run resumes after that epoch."""

    def after_train(self, trainer: Any) -> None:
        """Once, after the last epoch; not called when training ends in an error."""

    def on_break(self, trainer: Any) -> None:
        """Once, when a signal or an error ends training, perhaps in the middle of a hook.

        Other processes may be gone: call no collective here.
        """

    def state_dict(self) -> dict[str, Any]:
        """State to keep in checkpoints: numbers, strings, tensors, and lists and dicts of them."""
        return {}

    def check_state(self, state: Mapping[str, Any], trainer: Any, epoch: int) -> None:
        """Checks a state for `load_state_dict` before any part of the checkpoint is loaded.

        Args:
            state: The hook's state in the checkpoint.
            trainer: The trainer, freshly built.
            epoch: The checkpoint's epoch.

        Raises:
            ValueError: `state_dict` cannot have returned this state; names the entry.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class MovedSpec(dict[str, Any]):
    """A spec that was put into another one; messages name the key where it stands in the config."""

    def __init__(self, spec: Mapping[str, Any], where: str) -> None:
        super().__init__(spec)
        self.where = where


def build(registry: Registry, spec: object, where: str, **runtime: object) -> Any:
    """Builds the part that `spec` names, with the part's own signature as the schema.

    Args:
        registry: Where the name is looked up.
        spec: A mapping with `name` and options, or just the name.
        where: The key of `spec` in the config, for messages: `model.backbone`.
        **runtime: Facts that come from data or from other parts (number of cameras, of
            identities). A part takes those that its signature names, and so do the parts in its
            options; they cannot be set in the config.

    Raises:
        ConfigError: An unknown name, an unknown or missing option, a wrong type, or a value that
            the part itself refuses (its `ValueError`).
    """

    def build_inner(registry: Registry) -> Callable[[object, str], Any]:
        return lambda spec, where: build(registry, spec, where, **runtime)

    where = spec.where if isinstance(spec, MovedSpec) else where
    part, options = _resolve(registry, spec, where, runtime, build_inner)
    facts = {key: runtime[key] for key in _parameters(part) if key in runtime}
    try:
        built = part(**facts, **options)
        if isinstance(getattr(built, "config_key", None), str):
            built.config_key = where  # for what it says of its options later
        return built
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where} ({part.__name__}): {error}") from error


def check_spec(
    registry: Registry, spec: object, where: str, runtime: Collection[str] = ()
) -> set[str]:
    """Checks all that `build` checks before it calls the part.

    Args:
        registry: Where the name is looked up.
        spec: A mapping with `name` and options, or just the name.
        where: The key of `spec` in the config, for messages.
        runtime: Names of the facts that `build` will be given.

    Returns:
        The names of the facts that the part, or a part in its options, takes.

    Raises:
        ConfigError: An unknown name, an unknown or missing option, or a wrong type.
    """
    facts: set[str] = set()

    def check_inner(registry: Registry) -> Callable[[object, str], Any]:
        return lambda spec, where: facts.update(check_spec(registry, spec, where, runtime))

    where = spec.where if isinstance(spec, MovedSpec) else where
    part, _ = _resolve(registry, spec, where, runtime, check_inner)
    return facts.union(_parameters(part)).intersection(runtime)


def _resolve(
    registry: Registry,
    spec: object,
    where: str,
    runtime: Collection[str],
    take_inner: Callable[[Registry], Callable[[object, str], Any]],
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The part that a spec names, and its checked options; `take_inner` takes specs in options."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(
            f"{where}: expected a NAME with options, e.g. {{NAME: ...}}; got {shortened(spec)}"
        )
    options = {str(key): value for key, value in spec.items() if key != "name"}
    name = spec["name"]
    known = sorted(key for key, _ in registry)
    if name not in registry:
        raise ConfigError(
            f"{where}.name: {shortened(name)} is not registered in {registry._name}"
            f"{list_hint(name) or nearest(name, known)}; known: {', '.join(known) or 'none'}. Is "
            "the package that registers it in PLUGINS?"
        )
    part: Callable[..., Any] = registry.get(name)
    parameters = _parameters(part)
    for key in options:
        if key in runtime and key in parameters:
            raise ConfigError(
                f"{where}.{key}: comes from the data or another part, remove it from the config"
            )
        if key not in parameters:
            choices = [other for other in parameters if other not in runtime]
            raise ConfigError(
                f"{where}.{key}: {name} has no such option"
                f"{our_key(f'{where}.{key}') or nearest(key, choices)}; "
                f"options: {', '.join(choices) or 'none'}"
            )
    inner = {interface: take_inner(other) for interface, other in PART_OF.items()}
    checked: dict[str, Any] = {}
    for key, (annotation, required) in parameters.items():
        if key in options:
            checked[key] = check_type(options[key], annotation, f"{where}.{key}", inner)
        elif required and key not in runtime:
            raise ConfigError(
                f"{where}.{key}: {name} needs this option ({type_name(annotation)}), it is missing"
            )
    return part, checked


def _parameters(part: Callable[..., object]) -> dict[str, tuple[object, bool]]:
    """Option name -> (type, required) of a class or function.

    A class whose constructor takes `**options` has the options of its base too, except those that
    it sets itself (`fixed_options`).
    """
    function = part.__init__ if inspect.isclass(part) else part
    hints = typing.get_type_hints(function, include_extras=True)
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
