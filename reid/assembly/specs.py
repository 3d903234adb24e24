"""Checks every spec of a config before the first image is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from reid import distributed
from reid.assembly.labelling import labeller_spec
from reid.config import Config
from reid.registry import (
    BACKBONE,
    CLUSTERER,
    DATASET,
    EVALUATOR,
    HEAD,
    HOOK,
    LABELLER,
    LOSS,
    MAP,
    SAMPLER,
    TRANSFORM,
    ConfigError,
    Range,
    Registry,
    build,
    check_spec,
    check_type,
)

RUNTIME: Mapping[str, tuple[str, ...]] = {
    "BACKBONE": ("image_size", "num_cameras", "unseen_cameras"),
    "HEAD": ("backbone",),
    "LABELLER": ("source_domains",),
    "LOSS": ("embed_dim", "num_parts", "num_classes", "num_cameras", "source_domains"),
    "SAMPLER": ("source_domains", "seed", "rank", "world_size"),
    "TRANSFORM": ("mean",),
    "HOOK": ("output_dir", "images", "labeller", "writer"),
}
"""Registry -> names of the arguments that its parts get from `build`, beside their options."""

_NOT_ON_TRIAL = (BACKBONE, HEAD, HOOK)  # these are large, or have effects such as opening a file
_Weight = Annotated[float, Range(0, 1_000_000)]


def check_specs(config: Config, *, training: bool) -> None:
    """Checks the name and the options of every part that a config names.

    Parts that need no facts about the data are built once as a trial, so that they also check the
    values of their options. This may use random numbers, but looks for no image and reads no
    weights.

    Args:
        config: The config; its plug-ins must be imported already.
        training: Require the parts that only training needs.

    Raises:
        ConfigError: A part is unknown or missing, or an option is unknown, missing or wrong.
    """
    check = _Checker(config)
    sets = config.datasets
    if training or sets.train:
        _check_joined(check, sets.train, "datasets.train")
    if sets.source is not None:
        _check_joined(check, sets.source, "datasets.source")
    for i, spec in enumerate(sets.test):
        where = f"datasets.test[{i}]"
        check(DATASET, dataset_options(spec, where)[0], where)
    check(BACKBONE, config.model.backbone, "model.backbone")
    check(HEAD, config.model.head, "model.head")
    check(EVALUATOR, config.test.evaluator, "test.evaluator")
    for i, spec in enumerate(config.hooks):
        check(HOOK, spec, f"hooks[{i}]")
    for number in range(len(config.stages) or 1):
        try:
            _check_stage(check, config.of_stage(number), training)
        except ConfigError as error:
            if not config.stages:
                raise
            raise ConfigError(f"stages[{number}]: {error}") from None


def _check_joined(check: _Checker, specs: Any, where: str) -> None:
    """Checks a dataset, or several that are joined.

    Raises:
        ConfigError: A dataset is unknown or missing, or an option is wrong.
    """
    if not isinstance(specs, list):
        check(DATASET, dataset_options(specs, where)[0], where)
        return
    for i, spec in enumerate(specs):
        check(DATASET, dataset_options(spec, f"{where}[{i}]")[0], f"{where}[{i}]")


def _check_stage(check: _Checker, config: Config, training: bool) -> None:
    """Checks the parts that a stage may change.

    Raises:
        ConfigError: A part is unknown or missing, or an option is unknown, missing or wrong.
    """
    for i, spec in enumerate(config.input.transforms):
        check(TRANSFORM, spec, f"input.transforms[{i}]")
    for view, steps in enumerate(config.input.views):
        for i, spec in enumerate(steps or ()):
            check(TRANSFORM, spec, f"input.views[{view}][{i}]")
    for i, spec in enumerate(config.input.maps):
        check(MAP, spec, f"input.maps[{i}]")
    if training or config.dataloader.sampler:
        check(SAMPLER, config.dataloader.sampler, "dataloader.sampler")
    if training and not config.criterion:
        raise ConfigError("criterion: expected a list of losses, but it is empty")
    for i, spec in enumerate(config.criterion):
        check(LOSS, loss_options(spec, f"criterion[{i}]")[0], f"criterion[{i}]")
    if config.clusterer is not None:
        check(CLUSTERER, config.clusterer, "clusterer")
    check(LABELLER, labeller_spec(config), "labeller")


def dataset_options(spec: Any, where: str) -> tuple[Any, str, Any]:
    """Splits a dataset's spec into the spec itself, `leave_out` ("" if not set) and `validation`.

    Raises:
        ConfigError: No dataset is named, or `leave_out` is not text.
    """
    if not spec:
        raise ConfigError(
            f"{where}: expected a dataset, e.g. {{NAME: Market1501}}, but it is not set"
        )
    if not isinstance(spec, Mapping):
        return spec, "", None
    options = dict(spec)
    leave_out = options.pop("leave_out", "")
    if not isinstance(leave_out, str):
        raise ConfigError(f"{where}.leave_out: expected a file, got {leave_out!r}")
    return options, leave_out, options.pop("validation", None)


def loss_options(spec: Any, where: str) -> tuple[Any, float, str]:
    """Splits a loss's spec into the spec itself, `weight` (default 1) and `as` (default "").

    Raises:
        ConfigError: The weight is not a number of 0 or more, or the name is not text.
    """
    if not isinstance(spec, Mapping):
        return spec, 1.0, ""
    options = dict(spec)
    weight = check_type(options.pop("weight", 1.0), _Weight, f"{where}.weight")
    return options, weight, check_type(options.pop("as", ""), str, f"{where}.as")


class _Checker:
    """Checks specs; builds a part as a trial if it needs no facts about the data."""

    def __init__(self, config: Config) -> None:
        self._known: dict[str, object] = {
            "mean": config.input.pixel_mean,
            "source_domains": config.datasets.source_domains,
            "seed": config.seed,
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
        }

    def __call__(self, registry: Registry, spec: object, where: str) -> None:
        names = RUNTIME.get(registry._name, ())
        facts = check_spec(registry, spec, where, names)
        if registry not in _NOT_ON_TRIAL and facts <= self._known.keys():
            known = {name: self._known[name] for name in names if name in self._known}
            build(registry, spec, where, **known)
