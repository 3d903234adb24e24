"""A whole training run."""

from __future__ import annotations

import logging
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
    checkpoint_paths,
    epoch_of,
    newest_checkpoint,
)
from reid.engine.logs import PICTURES, MetricWriter
from reid.engine.randomness import seed_everything
from reid.engine.stopping import Interrupted, StopSignals
from reid.engine.trainer import Trainer
from reid.files import remove_leftovers, write_text
from reid.modeling.weights import WeightsError
from reid.registry import ConfigError, shortened
from reid.workflows.report import REPORT, report_at_end
from reid.workflows.session import alone_in, explained, started

logger = logging.getLogger(__name__)

_FILES = {
    REPORT: "all of this on one page: results, curves, pictures, health in words",
    "config.yaml": "everything that was set, resolved",
    "log.txt": "this text",
    "metrics.json": "losses, cluster statistics, results; one JSON object a line",
    "results.json": "every evaluation; of the last one AP by query, camera pairs, hardest queries",
    "ranked_lists.png": "queries with their ten best matches, right and wrong",
    "similarities.png": "how alike images of the same person and of different persons are",
    "clusters.png": "the last clusters, with cameras and mistakes",
    "clusters.csv": "each image with its cluster, camera and confidence",
    "matches.csv": "the best matches across cameras",
    "matches.png": "the same as pictures",
    BEST_MODEL: "weights of the best evaluation",
    FINAL_MODEL: "weights at the end",
    CHECKPOINTS: "what --resume goes on from",
}
_ENDS_WITH = (FINAL_MODEL, "results.json")
"""What a run writes last."""
_REPORTS = "nonfinite_*.json"
_EVENTS = "events.out.tfevents.*"


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_change: bool = False,
) -> None:
    """Trains, evaluates, and leaves everything in `config.output_dir`.

    Args:
        config: What to train.
        resume: Go on from the newest whole checkpoint in the output folder; start where there is
            none.
        overwrite: Start anew where the output folder holds a run.
        allow_config_change: Resume with settings under which training takes another course.

    Raises:
        ConfigError: A setting is wrong, the output folder holds another run or is in use by one,
            or the run to go on with had other settings.
        DataError: The images are not what was expected.
        WeightsError: No checkpoint is whole, or it does not fit.
        ClusteringError: The features give no clusters.
        FloatingPointError: A loss is not finite.
        OutputError: A file cannot be written.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the last whole epoch is written.
    """
    output_dir = Path(config.output_dir)
    with alone_in(output_dir):
        _protect_config(output_dir, config.sources, resume or overwrite)
        _protect(output_dir, resume, overwrite)
        with started(config) as (device, signals):
            logger.info("Config\n%s", dump_config(config).rstrip())
            register_parts(config)
            check_specs(config, training=True)
            seed_everything(config.seed)
            checkpoint = newest_checkpoint(output_dir) if resume else None
            if resume and checkpoint is None:
                logger.warning("%s holds no checkpoint: training starts anew", output_dir)
            if checkpoint is not None:
                _check_epoch(*checkpoint)
                if _is_done(output_dir, checkpoint[1].get("epoch"), config.solver.max_epochs):
                    return
                _compare_configs(output_dir / "config.yaml", config, allow_config_change)
            writer = MetricWriter(output_dir)
            trainer = build_trainer(config, device, writer, signals)
            if checkpoint is not None:
                _load_state(trainer, *checkpoint)
                logger.info("Resumed from %s after epoch %d", checkpoint[0], trainer.epoch)
            # A wrong setting has stopped us by now; an earlier run's files are safe till here.
            if distributed.is_main():
                if overwrite:
                    _remove_run(output_dir)
                remove_leftovers(output_dir)
                write_text(output_dir / "config.yaml", dump_config(config))
            _run(trainer, writer, signals, output_dir)
            report_at_end(output_dir)
            _log_files(output_dir)


def _run(trainer: Trainer, writer: MetricWriter, signals: StopSignals, output_dir: Path) -> None:
    """Trains; a signal's message says what is kept."""
    for name, part in trainer.model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        logger.info("Model %s: %s, %s parameters", name, type(part).__name__, f"{count:,}")
    writer.start(trainer.epoch, trainer.step)
    try:
        with explained(signals):
            trainer.train()
    except Interrupted as stop:
        if not distributed.is_main():  # the main process may be writing the checkpoint yet
            raise
        raise Interrupted(stop.signum, f"{stop}; {_what_is_kept(output_dir)}") from None
    finally:
        writer.close()


def _protect_config(output_dir: Path, sources: Sequence[Path], goes_on: bool) -> None:
    """Makes sure that a config.yaml which nobody's run has written is not overwritten.

    Args:
        output_dir: Of the run.
        sources: The config files that were read.
        goes_on: The run resumes or overwrites another one there.

    Raises:
        ConfigError: It would be.
    """
    there = output_dir / "config.yaml"
    if not there.exists() or (goes_on and (output_dir / "log.txt").exists()):
        return
    if any(source.exists() and source.samefile(there) for source in sources):
        raise ConfigError(
            f"output_dir: {str(there)!r} is the config file itself, and the run would write its "
            "own in its place; choose another folder"
        )
    if not (output_dir / "log.txt").exists():
        raise ConfigError(
            f"output_dir: {str(there)!r} is there and is of no run; choose another folder, or give "
            "the file another name"
        )


def _protect(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Makes sure that a run is not lost by mistake.

    Raises:
        ConfigError: The folder holds a run.
    """
    if overwrite or (resume and checkpoint_paths(output_dir)):
        return
    # model_best alone is left by a run that was killed in its first epoch
    kept = (FINAL_MODEL, "results.json")
    there = [path.name for path in checkpoint_paths(output_dir)]
    there += [name for name in kept if (output_dir / name).exists()]
    if there and resume:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds {', '.join(there)} but no checkpoint to resume "
            "from; --overwrite starts anew"
        )
    if there:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds a run already; --resume goes on with it, "
            "--overwrite starts anew"
        )


def _compare_configs(stored: Path, config: Config, allow_change: bool) -> None:
    """Shows how the config differs from that of the run to go on with.

    Raises:
        ConfigError: Training would take another course, and this was not allowed.
    """
    if not stored.exists():
        logger.warning("%s is missing: nothing tells whether the settings have changed", stored)
        return
    difference, other_course = config_diff(stored, config)
    if other_course and not allow_change:
        raise ConfigError(
            f"the run in {stored.parent} had other settings, under which training takes another "
            f"course:\n{difference}\nresume with the old ones, or with --allow-config-change: the "
            "new ones then count from the next epoch on"
        )
    if difference:
        logger.warning("Settings have changed since this run began\n%s", difference)


def _what_is_kept(output_dir: Path) -> str:
    paths = checkpoint_paths(output_dir)
    if not paths:
        return "no epoch was finished, so that there is no checkpoint: --resume starts anew"
    return f"{paths[0]} holds the last whole epoch: --resume goes on from it"


def _is_done(output_dir: Path, epoch: object, max_epochs: int) -> bool:
    """Whether a run has nothing left to train and, at its last epoch, nothing left to write."""
    if type(epoch) is not int or epoch < max_epochs:
        return False
    if epoch == max_epochs and not all((output_dir / name).exists() for name in _ENDS_WITH):
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
            f"{checkpoint}: does not fit this config; resume with the config.yaml that lies beside "
            f"it ({error})"
        ) from error


def _remove_run(output_dir: Path) -> None:
    """Removes what an earlier run has written, but for log.txt, which goes on."""
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
