"""Evaluates features without a trainer, and reports the results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from tabulate import tabulate

from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.feature_files import load_features, telling_memory
from reid.evaluation.ranking import rank
from reid.registry import EVALUATOR, ConfigError, build
from reid.structures import FeatureSet, ProgressBar, part_of_progress
from reid.yaml_text import parse_yaml

logger = logging.getLogger(__name__)

_FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2)
_HARDEST = 10


def evaluate_file(
    path: Path,
    csv: Path | None = None,
    evaluator: str = "Market1501Evaluator",
    options: Sequence[str] = (),
    progress: ProgressBar | None = None,
) -> dict[str, Any]:
    """The report of `evaluate_features` on the features of a file.

    Raises:
        DataError: The file cannot be used (see `load_features`), or there is too little memory.
        ConfigError: The evaluator or an option is unknown or wrong.
        ValueError: No query has a match.
    """
    with telling_memory(path):
        return evaluate_features(*load_features(path, csv), evaluator, options, progress)


def evaluate_features(
    query: FeatureSet,
    gallery: FeatureSet,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
    evaluator: str = "Market1501Evaluator",
    options: Sequence[str] = (),
    progress: ProgressBar | None = None,
) -> dict[str, Any]:
    """A full report on query and gallery features.

    Args:
        query: Features of unit length.
        gallery: Features of unit length.
        query_paths: Q paths of the queries' images, if they are known.
        gallery_paths: Paths of the gallery's images, if they are known. With both, an image is
            never its own match.
        evaluator: Name in EVALUATOR.
        options: KEY VALUE pairs for its constructor.
        progress: Called with (queries' worth of work done, Q).

    Returns:
        `numbers`: those of the evaluator. `TPR@FPR`: verification by Euclidean distance, whatever
        the evaluator ranks by; empty if no query has a match. And the entries of
        `ranking_details`.

    Raises:
        ConfigError: The evaluator or an option is unknown or wrong.
        ValueError: No query has a match and the evaluator needs one, or features are not finite.
    """
    spec = _evaluator_spec(evaluator, options)
    scorer = cast(Evaluator, build(EVALUATOR, spec, "evaluator"))
    ranking = part_of_progress(progress, len(query), 0, 0.5)
    scoring = part_of_progress(progress, len(query), 0.5, 1)
    evaluation = rank(
        query,
        gallery,
        ap=scorer.ap,
        details=Details(camera_pairs=True, similarities=True),
        query_paths=query_paths,
        gallery_paths=gallery_paths,
        needs_match=scorer.needs_match,
        progress=ranking,
    )
    counts = evaluation.counts
    if counts.ignored and scorer.needs_match:
        logger.warning(evaluation.relevance.ignored_text(counts))
    evaluation = scorer.rank_again(evaluation, scoring)
    numbers = scorer(evaluation)
    if progress is not None:
        progress(len(query), len(query))
    return {
        "evaluator": spec,
        "numbers": numbers,
        "TPR@FPR": _verification(evaluation) if counts.with_match else {},
        **ranking_details(evaluation),
    }


def _verification(evaluation: Evaluation) -> dict[str, float]:
    assert evaluation.similarities is not None
    rates = evaluation.similarities.true_positive_rates(_FALSE_POSITIVE_RATES)
    return {
        f"{rate:g}": float(value) for rate, value in zip(_FALSE_POSITIVE_RATES, rates, strict=True)
    }


def _evaluator_spec(name: str, options: Sequence[str]) -> dict[str, Any]:
    if len(options) % 2:
        raise ConfigError(f"expected KEY VALUE pairs, got {' '.join(options)!r}")
    spec: dict[str, Any] = {"name": name}
    for key, value in zip(options[::2], options[1::2], strict=True):
        try:
            spec[key.lower()] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} is not a YAML value") from error
    return spec


def ranking_details(evaluation: Evaluation) -> dict[str, Any]:
    """Details behind the numbers of an evaluation.

    Args:
        evaluation: With `camera_pairs`, if the result is to have them.

    Returns:
        `counts` (see `Counts`); `ap` and `ranked_by`, which say how the rest was computed;
        `hardest_queries` (indices, worst first), with paths `hardest_query_paths` in the same
        order; `camera_pairs` with `query_cameras`, `gallery_cameras` and their `mAP` (None where
        there is no match), or None; and `per_query_AP` (Q; None without a match).
    """
    ranking, pairs = evaluation.ranking, evaluation.camera_pairs
    hardest = ranking.hardest(_HARDEST).tolist()
    details: dict[str, Any] = {
        "counts": evaluation.counts.as_dict(),
        "ap": evaluation.ap,
        "ranked_by": evaluation.ranked_by,
        "hardest_queries": hardest,
    }
    if evaluation.query_paths is not None:
        details["hardest_query_paths"] = [evaluation.query_paths[row] for row in hardest]
    details["camera_pairs"] = None
    if pairs is not None:
        details["camera_pairs"] = {
            "query_cameras": pairs.query_cameras.tolist(),
            "gallery_cameras": pairs.gallery_cameras.tolist(),
            "mAP": [[_or_none(value) for value in row] for row in pairs.mAP],
        }
    details["per_query_AP"] = [_or_none(value) for value in ranking.average_precision]
    return details


def report_text(report: Mapping[str, Any]) -> str:
    """The report as tables, in percent."""
    numbers = report["numbers"] | {
        f"TPR@FPR {rate}": value for rate, value in report["TPR@FPR"].items()
    }
    kind = f"AP {report['ap']}, {report['ranked_by']}"
    queries, gallery = report["counts"]["queries"], report["counts"]["gallery"]
    tables = [
        _table([[f"{100 * value:.1f}" for value in numbers.values()]], [*numbers]),
        f"Queries: {queries['all']:,}, with a match {queries['with_match']:,}, ignored "
        f"{queries['ignored']:,}\nGallery: {gallery['all']:,}, junk {gallery['junk']:,}, "
        f"distractors {gallery['distractors']:,}",
    ]
    pairs = report["camera_pairs"]
    if pairs is not None:
        rows = [
            [f"camera {camid}", *("" if value is None else f"{100 * value:.1f}" for value in row)]
            for camid, row in zip(pairs["query_cameras"], pairs["mAP"], strict=True)
        ]
        headers = ["query", *(f"camera {camid}" for camid in pairs["gallery_cameras"])]
        title = f"mAP from the row's camera to the column's ({kind})\n"
        tables.append(title + _table(rows, headers))
    precision = report["per_query_AP"]
    paths = report.get("hardest_query_paths")
    hardest = [
        [row, f"{100 * precision[row]:.1f}", *([paths[place]] if paths else [])]
        for place, row in enumerate(report["hardest_queries"])
    ]
    headers = ["query", "AP", *(["image"] if paths else [])]
    tables.append(f"Hardest queries ({kind})\n" + _table(hardest, headers))
    return "\n\n".join(tables)


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
