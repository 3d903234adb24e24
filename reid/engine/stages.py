"""The stages of a run: what each one brings, and which one an epoch is in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader

from reid.engine.optimization import Optimization
from reid.modeling.classifiers import fit_classifiers
from reid.modeling.losses import Criterion
from reid.stage_settings import StageRun
from reid.structures import Batch


@dataclass(frozen=True)
class StageParts:
    """What is new in a stage.

    Attributes:
        criterion: The losses, with their memories; on the device that trains.
        optimization: Trains the parameters of the model and of `criterion`.
        loader: Yields `Batch`; its batch sampler has `set_epoch`.
    """

    criterion: Criterion
    optimization: Optimization
    loader: DataLoader[Batch]


def carry_losses(ended: Criterion, begun: Criterion) -> None:
    """Gives the losses of a stage the parameters of those of the stage before.

    Args:
        ended: The losses of the stage before.
        begun: The same losses in the same order; others may follow behind them.

    Raises:
        ValueError: They are other losses, or have other parameters.
    """
    before, after = list(ended), list(begun)
    kinds = [[type(loss).__name__ for loss in losses] for losses in (before, after)]
    if kinds[0] != kinds[1][: len(before)]:
        raise ValueError(
            "stages: a stage whose losses are carried needs those of the stage before "
            f"({', '.join(kinds[0])}), and may have more behind them; got {', '.join(kinds[1])}"
        )
    for old, new in zip(before, after, strict=False):
        state = old.state_dict()
        fit_classifiers(new, state)
        shapes = [{n: tuple(v.shape) for n, v in s.items()} for s in (state, new.state_dict())]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"stages: {type(new).__name__} cannot go on with the parameters of the stage "
                "before, which have other names or shapes; give it the same options in both stages"
            )
        new.load_state_dict(state)


class Stages:
    """The stages of a run in order, each built when it begins.

    Args:
        runs: They follow each other without a gap, from epoch 0.
        build: Builds the parts of a stage. The trainer has those of the first one already.
    """

    def __init__(self, runs: Sequence[StageRun], build: Callable[[StageRun], StageParts]) -> None:
        self._runs = runs
        self._starts = [run.start for run in runs]
        self.build = build

    def at(self, epoch: int) -> StageRun:
        """The stage of an epoch, from 0; of an epoch after the end, the last stage."""
        return self._runs[bisect_right(self._starts, epoch) - 1]

    def title(self, run: StageRun) -> str:
        """A stage for the log: its number among all, its name, its epochs, counted from 1."""
        number = self._starts.index(run.start) + 1
        name = f" ({run.name})" if run.name else ""
        last = run.start + run.epochs
        epochs = f"epoch {last}" if run.epochs == 1 else f"epochs {run.start + 1} to {last}"
        return f"Stage {number} of {len(self._runs)}{name}: {epochs}"
