"""A whole run: train or evaluate what a config describes."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from reid import distributed
from reid.config import Config, dump_config
from reid.engine.build import build_evaluator, build_test_sets, build_trainer, import_plugins
from reid.engine.checkpoints import (
    BEST_MODEL,
    CHECKPOINTS,
    FINAL_MODEL,
    checkpoint_paths,
    newest_checkpoint,
)
from reid.engine.logs import PICTURES, MetricWriter, environment, run_logging
from reid.engine.networks import build_trained_model, pick_device, place_model
from reid.engine.provenance import config_diff, provenance
from reid.engine.randomness import seed_everything
from reid.engine.splits import count_splits, log_dataset
from reid.engine.stopping import Interrupted, StopSignals
from reid.engine.testing import draw_test_pictures, evaluate, results_table
from reid.engine.trainer import Trainer
from reid.files import remove_leftovers, write_text
from reid.modeling.weights import WeightsError
from reid.registry import ConfigError
from reid.structures import DataError

logger = logging.getLogger(__name__)

_FILES = {
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
        ConfigError: A setting is wrong, the output folder holds another run, or the run to go on
            with had other settings.
        DataError: The images are not what was expected.
        WeightsError: No checkpoint is whole, or it does not fit.
        ClusteringError: The features give no clusters.
        FloatingPointError: A loss is not finite.
        OutputError: A file cannot be written.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the last whole epoch is written.
    """
    output_dir = Path(config.output_dir)
    _protect(output_dir, resume, overwrite)
    with _started(config) as (device, signals):
        seed_everything(config.seed)
        logger.info("Config\n%s", dump_config(config).rstrip())
        import_plugins(config.plugins)
        found = newest_checkpoint(output_dir) if resume else None
        if resume and found is None:
            logger.warning("%s holds no checkpoint: training starts anew", output_dir)
        if found is not None:
            _compare_configs(output_dir / "config.yaml", config, allow_config_change)
        writer = MetricWriter(output_dir)
        trainer = build_trainer(config, device, writer, signals)
        if found is not None:
            _load_state(trainer, *found)
            logger.info("Resumed from %s after epoch %d", found[0], trainer.epoch)
        for name, part in trainer.model.named_children():
            count = sum(parameter.numel() for parameter in part.parameters())
            logger.info("Model %s: %s, %s parameters", name, type(part).__name__, f"{count:,}")
        # A wrong setting has stopped us by now; an earlier run's files are safe till here.
        if distributed.is_main():
            if overwrite:
                _remove_run(output_dir)
            remove_leftovers(output_dir)
            write_text(output_dir / "config.yaml", dump_config(config))
        writer.start(trainer.epoch, trainer.step)
        try:
            with _explained(signals):
                trainer.train()
        except Interrupted as stop:
            if not distributed.is_main():  # the main process may be writing the checkpoint yet
                raise
            raise Interrupted(stop.signum, f"{stop}; {_what_is_kept(output_dir)}") from None
        finally:
            writer.close()
        _log_files(output_dir)


def test(config: Config) -> dict[str, dict[str, float]]:
    """Evaluates `config.model.weights` on the test sets.

    Leaves results_eval_only.json in `config.output_dir`: `weights`, `provenance`, and by test set
    the `numbers` with the details that `ranking_details` describes.

    Returns:
        Numbers by test set.

    Raises:
        ConfigError: A setting is wrong, no weights are set, or there is no test set.
        DataError: The images are not what was expected.
        WeightsError: The weights are broken or do not fit.
    """
    output_dir = Path(config.output_dir)
    with _started(config) as (device, _):
        import_plugins(config.plugins)
        test_sets = build_test_sets(config)
        if not test_sets:
            raise ConfigError("datasets.test: there is nothing to evaluate on")
        splits = count_splits("", [], test_sets)
        log_dataset(splits)
        model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
        place_model(model, config, device)
        evaluator = build_evaluator(config)
        found = {
            test_set.name: evaluate(model, test_set, evaluator, device, details=True)
            for test_set in test_sets
        }
        results = {name: numbers for name, (numbers, _) in found.items()}
        rows = [(name, config.model.weights, numbers) for name, numbers in results.items()]
        logger.info("Results\n%s", results_table(rows))
        if distributed.is_main():
            path = output_dir / "results_eval_only.json"
            content = {
                "weights": config.model.weights,
                **{name: {"numbers": n, **details} for name, (n, details) in found.items()},
                "provenance": provenance(config, device, splits),
            }
            write_text(path, json.dumps(content, indent=2) + "\n")
        if config.test.ranked_lists:
            draw_test_pictures(model, test_sets[0], device, config.test.ranked_lists, output_dir)
    return results


@contextmanager
def _started(config: Config) -> Iterator[tuple[torch.device, StopSignals]]:
    """What every run stands in: its device, group of processes, logs and signals."""
    device = pick_device(config.device)
    # Twice, since another reading process may die while the death of the first is told.
    with StopSignals() as signals, _explained(signals):
        distributed.init_process_group(device, timedelta(minutes=config.process_timeout))
        try:
            with run_logging(Path(config.output_dir)), _explained(signals):
                logger.info("Environment\n%s", environment(device))
                yield device, signals
        finally:
            distributed.destroy_process_group()


def _tells_of_dead_worker(error: Exception) -> bool:
    """Whether torch's loader says so, or has just lost the connection to a reading process."""
    if isinstance(error, (ConnectionError, EOFError)):
        frames = traceback.walk_tb(error.__traceback__)
        return any(frame.f_globals["__name__"] == DataLoader.__module__ for frame, _ in frames)
    return "DataLoader worker (pid" in str(error) and not isinstance(error, DataError)


@contextmanager
def _explained(signals: StopSignals) -> Iterator[None]:
    """Says of torch's errors what they mean for a run."""
    try:
        yield
    except Exception as error:
        dead_worker = _tells_of_dead_worker(error)
        # A signal to all processes may end others, which this one notices, first.
        if signals.came(within_s=1.0 if dead_worker else 0.0):
            raise Interrupted(signals.signum) from error
        if dead_worker:
            raise DataError(
                f"a process that reads images has died ({error}). Most often memory is short, or "
                "shared memory (/dev/shm): lower dataloader.num_workers; 0 reads in the main "
                "process. --resume goes on from the last checkpoint"
            ) from error
        if "Expected more than 1 value per channel" in str(error):
            raise ConfigError(
                "dataloader.sampler.batch_size: a batch of one image, whose map has shrunk to one "
                f"place, has no variance for BatchNorm ({error}); take larger batches, or a larger "
                "input.size"
            ) from error
        if isinstance(error, DataError) and str(error).startswith("Caught DataError"):
            # torch puts a traceback before what a reading process says
            raise DataError(str(error).rpartition("DataError: ")[2].rstrip()) from error
        raise


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
