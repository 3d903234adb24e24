"""Evaluation without a trainer: features from a file become a full report."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import yaml
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from reid.data.datasets.csv_dataset import read_csv
from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.ranking import rank
from reid.registry import EVALUATOR, ConfigError, build
from reid.structures import DataError, FeatureSet, ProgressBar, part_of_progress
from reid.yaml_text import parse_yaml

logger = logging.getLogger(__name__)

_FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2)
_HARDEST = 10
_MOST_TIMES, _ALLOWANCE = 20, 64 * 2**20  # what an .npz file of features may unpack to, in bytes
_SPLITS = ("query", "gallery")


class LoadedFeatures(NamedTuple):
    """Features from a file.

    Attributes:
        query: Q features of unit length.
        gallery: Features of unit length.
        query_paths: Q paths of the queries' images, where a list gave them.
        gallery_paths: Paths of the gallery's images, where a list gave them.
    """

    query: FeatureSet
    gallery: FeatureSet
    query_paths: list[str] | None = None
    gallery_paths: list[str] | None = None


def load_features(path: Path, csv: Path | None = None) -> LoadedFeatures:
    """Query and gallery of an .npz file, with features made unit vectors.

    Args:
        path: With `query_feat` (Q, D), `gallery_feat` (G, D), `query_pids`, `gallery_pids`,
            `query_camids` and `gallery_camids`; or with `features` (N, D), if there is a list.
        csv: A list of N images, in the order of the features; images for training are passed over.

    Raises:
        DataError: A file is missing or broken, or unpacks to far more than its size; an array is
            missing, or lengths do not fit.
    """
    arrays = _read_arrays(path)
    if csv is None:
        query, gallery = (_feature_set(arrays, split, path) for split in _SPLITS)
        return LoadedFeatures(query, gallery)
    rows = read_csv(csv, allow_outside=True)  # no image is opened
    features = _features(arrays, "features", path).numpy()
    if len(features) != len(rows):
        raise DataError(f"{path}: has {len(features)} features, but {csv} lists {len(rows)} images")
    found, paths = [], []
    for split in _SPLITS:
        places = [place for place, (name, _) in enumerate(rows) if name == split]
        if not places:
            raise DataError(f"{csv}: lists no image of the split {split!r}")
        records = [rows[place][1] for place in places]
        chosen = {
            f"{split}_feat": features[places],
            f"{split}_pids": np.array([record.pid for record in records]),
            f"{split}_camids": np.array([record.camid for record in records]),
        }
        found.append(_feature_set(chosen, split, path))
        paths.append([record.path for record in records])
    return LoadedFeatures(found[0], found[1], paths[0], paths[1])


def evaluate_features(
    query: FeatureSet,
    gallery: FeatureSet,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
    evaluator: str = "Market1501Evaluator",
    options: Sequence[str] = (),
    progress: ProgressBar | None = None,
) -> dict[str, Any]:
    """All that can be told of query and gallery features.

    Args:
        query: Features of unit length.
        gallery: Features of unit length.
        query_paths: Q paths of the queries' images, where they are known.
        gallery_paths: Paths of the gallery's images, where they are known. With both, an image is
            never its own match.
        evaluator: Name in EVALUATOR.
        options: KEY VALUE pairs for its constructor.
        progress: Called with (queries' worth of work done, Q).

    Returns:
        `numbers`: the evaluator's. `TPR@FPR`: verification by Euclidean distance, whatever the
        evaluator ranks by. And what `ranking_details` gives.

    Raises:
        ConfigError: The evaluator or an option is unknown or wrong.
        ValueError: No query has a match, or features are not finite.
    """
    spec = _evaluator_spec(evaluator, options)
    scorer = cast(Evaluator, build(EVALUATOR, spec, "evaluator"))
    ranking, scoring = (
        part_of_progress(progress, len(query), *part) for part in ((0, 0.5), (0.5, 1))
    )
    evaluation = rank(
        query,
        gallery,
        ap=scorer.ap,
        details=Details(camera_pairs=True, similarities=True),
        query_paths=query_paths,
        gallery_paths=gallery_paths,
        progress=ranking,
    )
    counts = evaluation.counts
    if counts.ignored:
        logger.warning(evaluation.relevance.ignored_text(counts))
    evaluation = scorer.rank_again(evaluation, scoring)
    numbers = scorer(evaluation)
    if progress is not None:
        progress(len(query), len(query))
    assert evaluation.similarities is not None
    rates = evaluation.similarities.true_positive_rates(_FALSE_POSITIVE_RATES)
    return {
        "evaluator": spec,
        "numbers": numbers,
        "TPR@FPR": {
            f"{rate:g}": float(value)
            for rate, value in zip(_FALSE_POSITIVE_RATES, rates, strict=True)
        },
        **ranking_details(evaluation),
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
    """What lies behind the numbers of an evaluation.

    Args:
        evaluation: With `camera_pairs`, if these are to be told.

    Returns:
        `counts` (see `Counts`); `ap` and `ranked_by`, which say what all below is;
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


def _read_arrays(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, size = sum(r.file_size for r in archive.infolist()), path.stat().st_size
        if unpacked > _MOST_TIMES * size + _ALLOWANCE:
            raise ValueError(
                f"its {size:,} bytes unpack to {unpacked:,}; if that is right, save it with "
                "numpy.savez, which does not compress"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays.items())
    except Exception as error:  # numpy, zipfile and zlib have many for broken files
        raise DataError(f"{path}: cannot be read as an .npz file ({error})") from error


def _array(arrays: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in arrays:
        raise DataError(f"{path}: has no array {name!r}; it has {', '.join(arrays) or 'none'}")
    return arrays[name]


def _features(arrays: Mapping[str, Any], name: str, path: Path) -> Tensor:
    values = _array(arrays, name, path)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: {name} must be numbers (N, D), got {values.dtype} {values.shape}")
    with np.errstate(over="ignore"):
        features = torch.from_numpy(values.astype(np.float32))
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise DataError(
            f"{path}: {name} has values that are not finite in float32, first in {row=}"
        )
    return features


def _feature_set(arrays: Mapping[str, Any], split: str, path: Path) -> FeatureSet:
    feature = _features(arrays, f"{split}_feat", path)
    ids: list[Tensor] = []
    for name in (f"{split}_pids", f"{split}_camids"):
        values = _array(arrays, name, path)
        if values.shape != (len(feature),) or values.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name} must be {len(feature)} whole numbers, got {values.dtype} "
                f"{values.shape}"
            )
        ids.append(torch.from_numpy(values.astype(np.int64)))
    try:
        return FeatureSet.of(F.normalize(feature, dim=1), *ids)
    except ValueError as error:
        raise DataError(f"{path}: {split}: {error}") from error


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
