"""A whole run: train or evaluate what a config describes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reid import distributed
from reid.config import Config, dump_config
from reid.engine.build import (
    build_evaluator,
    build_test_sets,
    build_trained_model,
    build_trainer,
    import_plugins,
    log_dataset,
    pick_device,
)
from reid.engine.hooks import BEST_MODEL, FINAL_MODEL, LAST_CHECKPOINT
from reid.engine.logs import MetricWriter, environment, run_logging
from reid.engine.testing import draw_test_pictures, evaluate, results_table
from reid.engine.trainer import Trainer, seed_everything
from reid.files import write_text
from reid.modeling.weights import WeightsError, load_checkpoint
from reid.registry import ConfigError

logger = logging.getLogger(__name__)

_FILES = {
    "config.yaml": "everything that was set, resolved",
    "log.txt": "this text",
    "metrics.json": "losses, cluster statistics, results; one JSON object a line",
    "results.json": "every evaluation; of the last one AP by query, camera pairs, hardest queries",
    "ranked_lists.png": "queries with their ten best matches, right and wrong",
    "similarities.png": "how alike images of the same person and of different persons are",
    "clusters.png": "the last clusters, with cameras and mistakes",
    BEST_MODEL: "weights of the best evaluation",
    FINAL_MODEL: "weights at the end",
    LAST_CHECKPOINT: "what --resume goes on from",
}


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """Trains, evaluates, and leaves everything in `config.output_dir`.

    Args:
        config: What to train.
        resume: Go on from the last checkpoint in the output folder; start where there is none.
        overwrite: Start anew where the output folder holds a run.

    Raises:
        ConfigError: A setting is wrong, or the output folder holds another run.
        DataError: The images are not what was expected.
        WeightsError: A checkpoint is broken or does not fit.
    """
    output_dir = Path(config.output_dir)
    checkpoint = output_dir / LAST_CHECKPOINT
    if checkpoint.exists() and not (resume or overwrite):
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds a run already; --resume goes on with it, "
            "--overwrite starts anew"
        )
    device = pick_device(config.device)
    distributed.init_process_group(device)
    try:
        with run_logging(output_dir):
            seed_everything(config.seed)
            logger.info("Environment\n%s", environment(device))
            logger.info("Config\n%s", dump_config(config).rstrip())
            import_plugins(config.plugins)
            state = load_checkpoint(checkpoint) if resume and checkpoint.exists() else None
            if resume and state is None:
                logger.warning("%s does not exist: training starts anew", checkpoint)
            writer = MetricWriter(output_dir)
            trainer = build_trainer(config, device, writer)
            if state is not None:
                _load_state(trainer, state, checkpoint)
                logger.info("Resumed from %s after epoch %d", checkpoint, trainer.epoch)
            for name, part in trainer.model.named_children():
                count = sum(parameter.numel() for parameter in part.parameters())
                logger.info("Model %s: %s, %s parameters", name, type(part).__name__, f"{count:,}")
            # A wrong setting has stopped us by now; an earlier run's files are safe till here.
            if distributed.is_main():
                if overwrite:
                    _remove_run(output_dir)
                write_text(output_dir / "config.yaml", dump_config(config))
            writer.start(purge_step=trainer.step)
            try:
                trainer.train()
            finally:
                writer.close()
            _log_files(output_dir)
    finally:
        distributed.destroy_process_group()


def test(config: Config) -> dict[str, dict[str, float]]:
    """Evaluates `config.model.weights` on the test sets.

    Leaves results_eval_only.json in `config.output_dir`: `weights`, and by test set the `numbers`
    with the details that `ranking_details` describes.

    Returns:
        Numbers by test set.

    Raises:
        ConfigError: A setting is wrong, no weights are set, or there is no test set.
        DataError: The images are not what was expected.
        WeightsError: The weights are broken or do not fit.
    """
    output_dir = Path(config.output_dir)
    device = pick_device(config.device)
    distributed.init_process_group(device)
    try:
        with run_logging(output_dir):
            logger.info("Environment\n%s", environment(device))
            import_plugins(config.plugins)
            test_sets = build_test_sets(config)
            if not test_sets:
                raise ConfigError("datasets.test: there is nothing to evaluate on")
            log_dataset("", [], test_sets)
            model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
            model.to(device).eval()
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
                }
                write_text(path, json.dumps(content, indent=2) + "\n")
            if config.test.ranked_lists:
                draw_test_pictures(
                    model, test_sets[0], device, config.test.ranked_lists, output_dir
                )
    finally:
        distributed.destroy_process_group()
    return results


def _load_state(trainer: Trainer, state: Mapping[str, Any], checkpoint: Path) -> None:
    try:
        trainer.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{checkpoint}: does not fit this config; resume with the config.yaml that lies beside "
            f"it ({error})"
        ) from error


def _remove_run(output_dir: Path) -> None:
    """Removes what an earlier run has written, but for log.txt, which goes on."""
    for pattern in (*_FILES, "events.out.tfevents.*"):
        for path in output_dir.glob(pattern):
            if path.name != "log.txt":
                path.unlink()


def _log_files(output_dir: Path) -> None:
    lines = [f"  {name:<26}{text}" for name, text in _FILES.items() if (output_dir / name).exists()]
    logger.info(
        "Written to %s (TensorBoard: tensorboard --logdir %s)\n%s",
        output_dir,
        output_dir,
        "\n".join(lines),
    )
