"""Finds the differences between several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reid.assembly.provenance import BOOKKEEPING
from reid.workflows.report.run_files import RunFiles

_ABSENT = "-"


class Difference(NamedTuple):
    """A setting or fact in which runs differ.

    Attributes:
        name: The key of a setting, or the name of a fact about code, data or machine.
        values: The value in each run, as text.
    """

    name: str
    values: list[str]


def different_settings(runs: Sequence[RunFiles]) -> tuple[list[Difference], list[Difference]]:
    """The settings that differ, in the order of config.yaml.

    If a run lacks a setting, such as an option of another part, its value is `-`.

    Returns:
        Settings that results depend on, and settings that do not change results.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    texts = [{key: setting_text(value) for key, value in run.settings.items()} for run in runs]
    found = [Difference(key, [text.get(key, _ABSENT) for text in texts]) for key in keys]
    found = [difference for difference in found if len(set(difference.values)) > 1]
    bookkeeping = {key.upper() for key in BOOKKEEPING}
    return (
        [difference for difference in found if difference.name not in bookkeeping],
        [difference for difference in found if difference.name in bookkeeping],
    )


def different_surroundings(runs: Sequence[RunFiles]) -> list[Difference]:
    """Code, data, devices and versions that differ."""
    facts = [_surroundings(run) for run in runs]
    names = dict.fromkeys(name for fact in facts for name in fact)
    found = [Difference(name, [fact.get(name, _ABSENT) for fact in facts]) for name in names]
    return [difference for difference in found if len(set(difference.values)) > 1]


def setting_text(value: object) -> str:
    """A value as YAML in one line; words without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(setting_text, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) or "''"


def commit_text(provenance: Mapping[str, Any]) -> str:
    """The commit of the code, and whether files differed from it; empty if unknown."""
    git = provenance.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return ""
    return f"{git['commit']}{' with changes' if git.get('dirty') else ''}"


def _surroundings(run: RunFiles) -> dict[str, str]:
    facts = {"code (git)": commit_text(run.provenance)}
    for name in ("device", "processes", "python"):
        facts[name] = str(run.provenance.get(name, ""))
    for split in run.data:
        counts = zip(split[3:], ("images", "identities", "cameras"), strict=True)
        facts[f"{split.dataset} {split.split}"] = ", ".join(f"{n} {name}" for n, name in counts)
    libraries = run.provenance.get("libraries")
    for name, version in (libraries if isinstance(libraries, dict) else {}).items():
        facts[str(name)] = str(version)
    return {name: text for name, text in facts.items() if text}
