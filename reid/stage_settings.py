"""The stages of a config: how long each is, and the settings that it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from reid.checking import ConfigError, Range, from_mapping

_OF_A_STAGE = (
    "criterion",
    "clusterer",
    "labeller",
    "on_collapse",
    "datasets.domains",
    "dataloader.sampler",
    "input.transforms",
    "model.bn_samples_per_group",
    "solver",
)
_OF_THE_RUN = ("solver.max_epochs", "solver.amp", "solver.on_nonfinite", "solver.max_skipped")


@dataclass(frozen=True)
class StageSettings:
    """A stage of a run, or of a round.

    Attributes:
        epochs: Epochs each time that the stage runs.
        name: For the log.
        repeat: How often the stage runs before the next one begins.
        labels: `epoch`: new labels before each epoch. `once`: when the stage begins; they and the
            memories then stay until it ends.
        losses: `new`: all start anew. `carried`: they go on with the parameters, such as
            classifiers, of those of the stage before; further ones may follow behind them.
    """

    epochs: Annotated[int, Range(1, 1_000_000)]
    name: str = ""
    repeat: Annotated[int, Range(1, 1_000_000)] = 1
    labels: Literal["epoch", "once"] = "epoch"
    losses: Literal["new", "carried"] = "new"


@dataclass(frozen=True)
class StageRun:
    """One time that a stage runs. All numbers count from 0.

    Attributes:
        number: The stage's place in the config.
        name: The stage's name.
        start: The run's epoch in which it begins.
        epochs: How many epochs it lasts.
        round: The round that it is in.
        repetition: Which of the stage's repetitions in this round.
        losses: As in `StageSettings`.
    """

    number: int
    name: str
    start: int
    epochs: int
    round: int = 0
    repetition: int = 0
    losses: Literal["new", "carried"] = "new"


def read_stage(stage: Mapping[str, Any], where: str) -> tuple[StageSettings, dict[str, Any]]:
    """A stage of the config, and the settings that it changes.

    Args:
        stage: The stage as the config has it, with lower-case keys.
        where: Its key, for messages.

    Raises:
        ConfigError: `epochs` is missing, a value is wrong, or a stage cannot change a setting.
    """
    own = {key: value for key, value in stage.items() if key in StageSettings.__annotations__}
    changes = {key: value for key, value in stage.items() if key not in own}
    for key in _leaves(changes):
        if _is_below(key, _OF_THE_RUN) or not _is_below(key, _OF_A_STAGE):
            known = (*StageSettings.__annotations__, *_OF_A_STAGE)
            raise ConfigError(
                f"{where}.{key}: a stage cannot change this setting; a stage may have "
                f"{', '.join(known)} (but not {', '.join(_OF_THE_RUN)})"
            )
    return from_mapping(StageSettings, own, where), changes


def plan_stages(stages: Sequence[StageSettings], rounds: int) -> list[StageRun]:
    """All runs of all stages, in order: in each round every stage, as often as it repeats."""
    runs: list[StageRun] = []
    start = 0
    for round_number in range(rounds):
        for number, stage in enumerate(stages):
            for repetition in range(stage.repeat):
                place = (start, stage.epochs, round_number, repetition)
                runs.append(StageRun(number, stage.name, *place, stage.losses))
                start += stage.epochs
    return runs


def _is_below(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and "name" not in value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
