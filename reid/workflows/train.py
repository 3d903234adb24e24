"""A whole training run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reid import distributed
from reid.assembly.plugins import register_parts
from reid.assembly.provenance import config_diff
from reid.assembly.specs import check_specs
from reid.assembly.trainer import build_trainer
from reid.config import Config, dump_config
from reid.engine.hooks.checkpoints import (
    BEST_MODEL,
    CHECKPOINTS,
    FINAL_MODEL,
    SOURCE_HALF,
    SOURCE_MODEL,
    checkpoint_paths,
    epoch_of,
    newest_checkpoint,
)
from reid.engine.metrics import PICTURES, MetricWriter
from reid.engine.randomness import seed_everything
from reid.engine.stopping import Interrupted, StopSignals, TimeIsUp
from reid.engine.trainer import Trainer
from reid.files import remove_leftovers, write_text
from reid.modeling.weights import WeightsError
from reid.registry import ConfigError, shortened
from reid.workflows.report import REPORT, report_at_end
from reid.workflows.session import alone_in, explained, started

logger = logging.getLogger(__name__)

_FILES = {
    REPORT: "the run on one page: results, curves, pictures, health in words",
    "config.yaml": "all settings, including defaults",
    "log.txt": "this log",
    "metrics.json": "losses, cluster statistics, results; one JSON object per line",
    "results.json": "every evaluation; for the last: AP by query, camera pairs, hardest queries",
    "ranked_lists.png": "queries with their ten best matches, right and wrong",
    "similarities.png": "similarities of images of the same person and of different persons",
    "clusters.png": "the last clusters, with cameras and mistakes",
    "clusters.csv": "each image with its cluster, camera and confidence",
    "matches.csv": "the best matches across cameras",
    "matches.png": "these matches as pictures",
    BEST_MODEL: "weights of the best evaluation",
    SOURCE_MODEL: "weights before adaptation, trained on the source alone",
    FINAL_MODEL: "weights at the end",
    SOURCE_HALF: "the same with the source's half of each BatchNorm",
    CHECKPOINTS: "checkpoints for --resume",
}
_ENDS_WITH = (FINAL_MODEL, REPORT)
"""A finished run has these files, newer than its last checkpoint; the page is written last."""
_REPORTS = "nonfinite_*.json"
_EVENTS = "events.out.tfevents.*"


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_change: bool = False,
    deadline: float = math.inf,
) -> None:
    """Trains and evaluates; writes everything to `config.output_dir`.

    Args:
        config: Describes the training.
        resume: Go on from the newest whole checkpoint in the output folder; without a checkpoint,
            start from the first epoch.
        overwrite: Replace a run that the output folder holds.
        allow_config_change: Resume even if settings that change training differ.
        deadline: After this time of `time.monotonic`, the run ends with its next whole epoch.

    Raises:
        ConfigError: A setting is wrong, the output folder holds another run or is in use by one,
            or the run to resume had other settings.
        DataError: The images are not what was expected.
        WeightsError: No checkpoint is whole, or it does not fit.
        ClusteringError: The features give no clusters.
        FloatingPointError: A loss is not finite.
        OutputError: A file cannot be written.
        Interrupted: A signal ended the run; a checkpoint of the last whole epoch is written.
        TimeIsUp: The deadline passed and epochs are left; a checkpoint is written likewise.
    """
    output_dir = Path(config.output_dir)
    with alone_in(output_dir):
        _protect_config(output_dir, config.sources, resume or overwrite)
        _protect(output_dir, resume, overwrite)
        with started(config) as (device, signals):
            signals.deadline = deadline
            logger.info("Config\n%s", dump_config(config).rstrip())
            register_parts(config)
            check_specs(config, training=True)
            seed_everything(config.seed)
            checkpoint = newest_checkpoint(output_dir) if resume else None
            if resume and checkpoint is None:
                logger.warning("%s holds no checkpoint: training starts over", output_dir)
            if checkpoint is not None:
                _check_epoch(*checkpoint)
                if _is_done(output_dir, *checkpoint, config.solver.max_epochs):
                    return
                _compare_configs(output_dir / "config.yaml", config, allow_config_change)
            writer = MetricWriter(output_dir)
            trainer = build_trainer(config, device, writer, signals)
            if checkpoint is not None:
                _load_state(trainer, *checkpoint)
                logger.info("Resumed from %s after epoch %d", checkpoint[0], trainer.epoch)
            # Remove an earlier run's files only now: a wrong setting has stopped us before.
            if distributed.is_main():
                if overwrite:
                    _remove_run(output_dir)
                remove_leftovers(output_dir)
                write_text(output_dir / "config.yaml", dump_config(config))
            _run(trainer, writer, signals, output_dir)
            report_at_end(output_dir)
            _log_files(output_dir)


def _run(trainer: Trainer, writer: MetricWriter, signals: StopSignals, output_dir: Path) -> None:
    """Trains; if a signal or the deadline ends training, the message names the last checkpoint."""
    for name, part in trainer.model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        logger.info("Model %s: %s, %s parameters", name, type(part).__name__, f"{count:,}")
    writer.start(trainer.epoch, trainer.step)
    try:
        with explained(signals):
            trainer.train()
    except Interrupted as stop:
        if not distributed.is_main():  # the main process may still be writing the checkpoint
            raise
        raise Interrupted(stop.signum, f"{stop}; {_last_checkpoint(output_dir)}") from None
    except TimeIsUp as stop:
        raise TimeIsUp(f"{stop}; {_last_checkpoint(output_dir)}") from None
    finally:
        writer.close()


def _protect_config(output_dir: Path, sources: Sequence[Path], goes_on: bool) -> None:
    """Protects a config.yaml that no run has written from being overwritten.

    Args:
        output_dir: The run's output folder.
        sources: The config files that were read.
        goes_on: The run resumes or overwrites an earlier run in this folder.

    Raises:
        ConfigError: The run would overwrite the file.
    """
    there = output_dir / "config.yaml"
    if not there.exists() or (goes_on and (output_dir / "log.txt").exists()):
        return
    if any(source.exists() and source.samefile(there) for source in sources):
        raise ConfigError(
            f"output_dir: {str(there)!r} is the config file itself, which the run would overwrite; "
            "choose another folder"
        )
    if not (output_dir / "log.txt").exists():
        raise ConfigError(
            f"output_dir: {str(there)!r} exists and no run has written it; choose another folder, "
            "or give the file another name"
        )


def _protect(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Protects an earlier run from being overwritten by mistake.

    Raises:
        ConfigError: The folder holds a run.
    """
    if overwrite or (resume and checkpoint_paths(output_dir)):
        return
    # model_best does not count: a run that was killed in its first epoch may leave it alone.
    there = [path.name for path in checkpoint_paths(output_dir)]
    names = (*_ENDS_WITH, "results.json")
    there += [name for name in names if (output_dir / name).exists()]
    if there and resume:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds {', '.join(there)} but no checkpoint to resume "
            "from; --overwrite starts over"
        )
    if there:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds a run already; --resume goes on with it, "
            "--overwrite starts over"
        )


def _compare_configs(stored: Path, config: Config, allow_change: bool) -> None:
    """Logs how the config differs from that of the run to resume.

    Raises:
        ConfigError: The difference changes training, and `allow_change` is false.
    """
    if not stored.exists():
        logger.warning("%s is missing, so changed settings cannot be detected", stored)
        return
    difference, other_course = config_diff(stored, config)
    if other_course and not allow_change:
        raise ConfigError(
            f"the run in {stored.parent} had other settings, and the difference changes "
            f"training:\n{difference}\nresume with the old settings, or give --allow-config-change "
            "to use the new ones from the next epoch on"
        )
    if difference:
        logger.warning("Settings have changed since this run began\n%s", difference)


def _last_checkpoint(output_dir: Path) -> str:
    paths = checkpoint_paths(output_dir)
    if not paths:
        return "no epoch was finished, so there is no checkpoint: --resume starts over"
    return f"{paths[0]} holds the last whole epoch: --resume goes on from it"


def _is_done(output_dir: Path, checkpoint: Path, state: Mapping[str, Any], max_epochs: int) -> bool:
    """Whether a run has trained all epochs and written all files."""
    epoch = state.get("epoch")
    if type(epoch) is not int or epoch < max_epochs:
        return False

    def written(name: str) -> bool:  # since this checkpoint, and not when fewer epochs were asked
        path = output_dir / name
        return path.exists() and path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns

    if epoch == max_epochs and not all(map(written, _ENDS_WITH)):
        return False
    logger.warning(
        "all %d epochs are done: nothing to train; SOLVER.MAX_EPOCHS above %d trains on",
        epoch,
        epoch,
    )
    return True


def _check_epoch(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Makes sure that a checkpoint is of the epoch that its name tells.

    Raises:
        WeightsError: It is not.
    """
    epoch, expected = state.get("epoch"), epoch_of(checkpoint)
    if type(epoch) is not int or epoch != expected:
        raise WeightsError(
            f"{checkpoint}: epoch: expected {expected} as the file's name says, got "
            f"{shortened(epoch)}"
        )


def _load_state(trainer: Trainer, checkpoint: Path, state: Mapping[str, Any]) -> None:
    try:
        trainer.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{checkpoint}: does not fit this config; resume with the config.yaml in its folder "
            f"({error})"
        ) from error


def _remove_run(output_dir: Path) -> None:
    """Removes the files of an earlier run, except log.txt, which is continued."""
    for pattern in (*_FILES, _REPORTS, _EVENTS, f"{PICTURES}/{_EVENTS}"):
        for path in output_dir.glob(pattern):
            if path.name != "log.txt":
                path.unlink()


def _log_files(output_dir: Path) -> None:
    lines = [f"  {name:<26}{text}" for name, text in _FILES.items() if any(output_dir.glob(name))]
    logger.info(
        "Written to %s (TensorBoard: tensorboard --logdir %s)\n%s",
        output_dir,
        output_dir,
        "\n".join(lines),
    )
