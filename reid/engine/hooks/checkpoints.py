"""Writes and finds the checkpoints of a run, and removes old ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reid import distributed
from reid.engine.trainer import Trainer
from reid.files import OutputError
from reid.modeling.domain_batchnorm import Domain, has_domains, plain_state
from reid.modeling.model import ReIDModel
from reid.modeling.weights import WeightsError, load_checkpoint, save_checkpoint, save_weights
from reid.registry import Hook

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoint_*.pth"
BEST_MODEL = "model_best.safetensors"
FINAL_MODEL = "model_final.safetensors"
SOURCE_MODEL = "model_source.safetensors"
SOURCE_HALF = "model_final_source_half.safetensors"
_NAME = re.compile(r"checkpoint_(\d+)\.pth")


class SaveCheckpoints(Hook):
    """Writes a checkpoint every `period` epochs, and the final weights.

    A checkpoint holds the state after the last step of an epoch, before other hooks do their work
    in `after_epoch`, such as an evaluation. A run that is killed during that work loses nothing: a
    resumed run starts with it. Epochs without a checkpoint are copied to memory, so that a run
    which a signal or an error ends early can still write its last whole epoch.

    Must be the first hook, so that the final weights are on disk before other hooks can fail in the
    last `after_epoch` or in `after_train`.

    Args:
        output_dir: Checkpoints and weights are written here.
        period: Epochs between checkpoints.
        keep: How many checkpoints stay; older ones are removed once a newer one is whole. 0 = all.
        source_end: The epoch up to which the model is trained on the source alone; it is then saved
            as `model_source`. None: there is none.
    """

    def __init__(
        self,
        output_dir: Path,
        period: int = 1,
        keep: int = 2,
        source_end: int | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._period = period
        self._keep = keep
        self._source_end = source_end
        self._unsaved: dict[str, Any] | None = None

    def save(self, trainer: Trainer) -> None:
        """Saves everything that the rest of training depends on.

        Raises:
            OutputError: The checkpoint cannot be written.
        """
        state = trainer.state_dict()
        self._unsaved = None
        if not distributed.is_main():
            return
        if trainer.epoch % self._period and trainer.epoch != trainer.max_epochs:
            self._unsaved = _copy(state)
        else:
            self._write(state)

    def on_break(self, trainer: Trainer) -> None:
        """Writes the state after the last whole epoch, if no checkpoint holds it yet."""
        if self._unsaved is not None:
            try:
                self._write(self._unsaved)
            except OutputError as error:  # logged, so that the error which ended the run goes on
                logger.error("%s", error)

    def after_epoch(self, trainer: Trainer) -> None:
        """Saves the source model and the final weights, before anything that may fail."""
        if trainer.epoch == self._source_end:
            save_model(trainer, self._output_dir / SOURCE_MODEL)
        if trainer.epoch == trainer.max_epochs:
            self.after_train(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Saves the final weights again: another hook may have changed them in `after_epoch`."""
        save_model(trainer, self._output_dir / FINAL_MODEL)
        if has_domains(trainer.inference_model):
            save_model(trainer, self._output_dir / SOURCE_HALF, "source")

    def _write(self, state: Mapping[str, Any]) -> None:
        path = self._output_dir / f"checkpoint_{state['epoch']:04d}.pth"
        save_checkpoint(path, state)
        self._unsaved = None
        older = []
        for other in checkpoint_paths(self._output_dir):
            if epoch_of(other) > state["epoch"]:
                other.unlink()  # a broken one: this run resumed from an older checkpoint instead
            elif other != path:
                older.append(other)
        for other in older[self._keep - 1 :] if self._keep else []:
            other.unlink()


def save_model(trainer: Trainer, path: Path, domain: Domain = "target") -> None:
    """Writes the model's weights as safetensors, with the epoch and facts about the training.

    Args:
        trainer: Has the model.
        path: The file.
        domain: Of a model with `DomainBatchNorm`, which half of each is written; the other one is
            left out, and the file fits the plain network.

    Raises:
        OutputError: The file cannot be written.
    """
    if distributed.is_main():
        model = trainer.inference_model
        assert isinstance(model, ReIDModel)
        metadata = {"epoch": str(trainer.epoch), **trainer.facts.about}
        save_weights(path, plain_state(model, domain), metadata)


def checkpoint_paths(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = [path for path in output_dir.glob(CHECKPOINTS) if _NAME.fullmatch(path.name)]
    return sorted(paths, key=epoch_of, reverse=True)


def newest_checkpoint(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The path and content of the newest whole checkpoint; None if the folder has none at all.

    Raises:
        WeightsError: The folder has checkpoints, but none is whole.
    """
    errors = []
    for path in checkpoint_paths(output_dir):
        try:
            state = load_checkpoint(path, verify=True)
        except WeightsError as error:
            errors.append(str(error))
            continue
        for message in errors:
            logger.warning("%s\nUsing %s instead, which is whole", message, path)
        return path, state
    if errors:
        raise WeightsError("\n".join((*errors, "no checkpoint is whole; --overwrite starts over")))
    return None


def epoch_of(path: Path) -> int:
    """The epoch in a checkpoint's file name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _copy(value: Any) -> Any:
    """A copy in main memory, which further training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
