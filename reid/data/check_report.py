"""What the checks of a data set found, as a dict for JSON, as text, and as a list to leave out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from reid.data.checks import (
    KINDS,
    WRONG,
    Splits,
    check_images,
    check_labels,
    check_paths,
    count_by_camera,
    sort_findings,
)
from reid.data.datasets.base import ReIDDataset, Split, SplitCounts
from reid.structures import DataError

_SHOWN = 5


def load_splits(dataset: ReIDDataset) -> Splits:
    """Every split that a data set has; query and gallery only together.

    Raises:
        DataError: Its files are not what was expected, or there is no split.
    """
    splits: list[Split] = ["train"] if dataset.has_train() else []
    if dataset.has_test():
        splits += ["query", "gallery"]
    if not splits:
        places = [f"{split} ({path})" for split, path in dataset.missing_splits().items()]
        raise DataError(
            f"{dataset.name}: has neither training images nor query and gallery"
            + (f"; there is no {' and no '.join(places)}" if places else "")
        )
    return {split: dataset.load(split) for split in splits}


def check_dataset(
    dataset: ReIDDataset,
    splits: Splits,
    *,
    images: bool = True,
    min_side: int = 16,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Counts beside the published ones, and everything that the checks find.

    Args:
        dataset: For its name, root, published counts and numbering.
        splits: Its images (see `load_splits`).
        images: Read the images too; else copies are recognised by their paths alone.
        min_side: Shortest side in pixels that is not `tiny`.
        workers: Threads that read.
        progress: Called with the number of images read since the last call.

    Returns:
        `name`, `version`, `root`, `missing` (splits that this copy lacks, and where they
        belong; no fault, since some users only train), `counts` (for each
        split `identities`, `images` and `cameras`, each with `found`, `published` and `verdict`:
        "as published", "differs", or None where nothing is published), `images_by_camera`,
        `images_read`, `findings` (dicts of `Finding`), `wrong` (kinds of what is wrong with their
        numbers, `counts` among them), and `ok`.
    """
    published = dataset.published()
    counts: dict[str, Any] = {}
    differing = 0
    for split, records in splits.items():
        found, expected = SplitCounts.of(records), published.get(split, SplitCounts())
        counts[split] = {}
        for field in fields(SplitCounts):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            verdict = None if other is None else "as published" if one == other else "differs"
            differing += verdict == "differs"
            counts[split][field.name] = {"found": one, "published": other, "verdict": verdict}
    findings = check_labels(splits, same_numbers=dataset.same_numbers)
    if images:
        findings += check_images(splits, min_side=min_side, workers=workers, progress=progress)
    else:
        findings += check_paths(splits)
    findings = sort_findings(findings)
    wrong = Counter(finding.kind for finding in findings if finding.kind in WRONG)
    summary = ({"counts": differing} if differing else {}) | dict(wrong)
    return {
        "name": dataset.name,
        "version": dataset.version,
        "root": str(dataset.root),
        "missing": {split: str(path) for split, path in dataset.missing_splits().items()},
        "counts": counts,
        "images_by_camera": {
            str(camid): dict(row) for camid, row in count_by_camera(splits).items()
        },
        "images_read": images,
        "findings": [asdict(finding) for finding in findings],
        "wrong": summary,
        "ok": not summary,
    }


def report_text(report: Mapping[str, Any], shown: int = _SHOWN) -> str:
    """The report in words and tables, with the first `shown` findings of each kind."""
    version = f" ({report['version']})" if report["version"] else ""
    parts = [f"{report['name']}{version} below {report['root']}"]
    if report["missing"]:
        lines = [f"  {split}  {path}" for split, path in report["missing"].items()]
        checked = " and ".join(report["counts"])
        parts.append("\n".join([f"NOT THERE  what follows is about {checked} alone", *lines]))
    parts.append(_count_table(report["counts"]))
    cameras = report["images_by_camera"]
    rows = [
        ["unknown" if camid == "-1" else camid, *(row.get(split, 0) for split in report["counts"])]
        for camid, row in cameras.items()
    ]
    parts.append("Images by camera\n" + _table(["camera", *report["counts"]], rows))
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for finding in report["findings"]:
        by_kind[finding["kind"]].append(finding)
    for kind, findings in by_kind.items():
        mark = "WRONG" if kind in WRONG else "note"
        lines = [f"{mark}  {kind}: {len(findings):,} ({KINDS[kind]})"]
        lines += [
            f"  {one['split']}  {one['subject']}: {one['detail']}" for one in findings[:shown]
        ]
        if len(findings) > shown:
            lines.append(f"  ... {len(findings) - shown:,} more (--json has all)")
        parts.append("\n".join(lines))
    if not report["images_read"]:
        parts.append("The images themselves were not read")
    wrong = ", ".join(f"{number:,} {kind}" for kind, number in report["wrong"].items())
    parts.append("Nothing wrong was found" if report["ok"] else f"Wrong: {wrong}")
    return "\n\n".join(parts)


def fix_list(report: Mapping[str, Any]) -> str:
    """Text of a list for `LEAVE_OUT`: the images that should be left out of the data set.

    Paths are relative to the root of data sets where they lie below it. An image with a line break
    in its path cannot be listed.

    Raises:
        ValueError: An image has such a path.
    """
    root = Path(report["root"])
    lines = [
        f"# {report['name']}: images to leave out (DATASETS.TRAIN.LEAVE_OUT), as the check found"
    ]
    written = set()
    for finding in report["findings"]:
        path = Path(finding["subject"])
        if not finding["leave_out"] or path in written:
            continue
        written.add(path)
        listed = path.relative_to(root) if path.is_relative_to(root) else path.absolute()
        if "\n" in str(listed):
            raise ValueError(f"{str(path)!r} cannot stand in a list, it has a line break")
        detail = " ".join(finding["detail"].split())
        name = str(listed)
        lines += [f"# {finding['kind']}: {detail}", f"./{name}" if name.startswith("#") else name]
    return "\n".join(lines) + "\n"


def _count_table(counts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = []
    for split, fields_ in counts.items():
        for name, cell in fields_.items():
            expected, verdict = cell["published"], cell["verdict"]
            if verdict == "differs":
                verdict = f"WRONG, by {cell['found'] - expected:+,}"
            rows.append(
                [
                    split,
                    name,
                    f"{cell['found']:,}",
                    "-" if expected is None else f"{expected:,}",
                    verdict or "",
                ]
            )
    return _table(["split", "", "found", "published", ""], rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return str(tabulate(rows, headers=headers))
