"""The sections, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

WHEELS = {
    "fvcore": "fvcore",
    "numba": "numba, with its llvmlite",
    "numpy": "numpy",
    "pytest": "pytest, with its pluggy and iniconfig",
    "tabulate": "tabulate",
    "timm": "timm",
    "torch": "torch",
    "torchvision": "torchvision",
}
"""What to install for a module that is missing."""

_CORE = ("torch", "torchvision", "timm", "numpy", "fvcore", "tabulate")
_SEARCH = (*_CORE, "numba")


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: Name in the JSON file and on the command line.
        title: Title on the page.
        group: `right` checks results, `fast` measures speed, `machine` describes the machine.
        run: `module:function`; the function takes a `Context`.
        share: Seconds in a run of six minutes; other runs scale it.
        needs: Modules that the section needs.
        alone: Run in a separate process on a GPU, for example because of `environment`.
        environment: Variables of that process, which a GPU's libraries read when they start.
    """

    name: str
    title: str
    group: Literal["machine", "right", "fast"]
    run: str
    share: float
    needs: tuple[str, ...] = _CORE
    alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Needed modules that this machine lacks."""
        return [name for name in self.needs if find_spec(name) is None]


def _section(
    group: Literal["right", "fast"],
    name: str,
    share: float,
    title: str,
    needs: tuple[str, ...] = _CORE,
    *,
    alone: bool = False,
    **environment: str,
) -> Section:
    run = f"{__package__}.{group}.{name}:run"
    return Section(name, title, group, run, share, needs, alone or bool(environment), environment)


SECTIONS = (
    Section(
        "machine", "The machine", "machine", f"{__package__}.machine:run", 5, ("torch", "numpy")
    ),
    _section("right", "gpu_tests", 45, "The suite's tests for a GPU", (*_CORE, "pytest")),
    _section("right", "losses", 12, "Every loss: values, gradients and memory as on the CPU"),
    _section("right", "precision", 25, "TMGF's losses in each precision, step by step"),
    _section("right", "overflow", 6, "A step that overflows in fp16 leaves no trace"),
    _section("right", "waiting", 8, "The host waits for nothing in a step"),
    _section("fast", "limits", 8, "What this device can do at most", ("torch", "numpy")),
    _section("fast", "training", 30, "TMGF's training step"),
    _section("fast", "stages", 10, "A training step by its parts"),
    _section("fast", "plain_step", 15, "The same step as the paper's equations say it"),
    _section("fast", "extraction", 10, "Extraction with images in memory"),
    _section("right", "neighbours", 40, "Neighbours, Jaccard distances, clusters", _SEARCH),
    _section("fast", "pseudo_labels", 35, "From features to pseudo-labels", _SEARCH),
    _section("fast", "ranking", 12, "Ranking a gallery of MSMT17's size", _SEARCH),
    _section("fast", "loss_step", 10, "The losses alone, by rows of the memory"),
    _section("fast", "loading", 20, "Images from JPEG files", _SEARCH),
    _section(
        "right", "resume", 12, "A resumed run has the same bits",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
    ),
    _section("right", "compiled", 25, "The compiled network gives what the plain one gives"),
    _section("fast", "modes", 45, "The training step compiled"),
    _section("right", "growth", 10, "Memory does not grow"),
    _section("right", "processes", 25, "Two processes on one device are one"),
    _section("fast", "networks", 20, "Other networks"),
    # In a separate process, because a failed recording may leave the process unusable.
    _section("fast", "graphs", 8, "The training step as one CUDA graph", alone=True),
    _section("fast", "epoch", 1, "An epoch on MSMT17, added up", ()),
)  # fmt: skip


def chosen(names: list[str] | None) -> tuple[Section, ...]:
    """The named sections in the order of the list above; without names, all sections.

    Raises:
        ValueError: A section does not exist.
    """
    if not names:
        return SECTIONS
    unknown = sorted({*names} - {section.name for section in SECTIONS})
    if unknown:
        raise ValueError(
            f"--only: there is no section {', '.join(unknown)}; there are "
            f"{', '.join(section.name for section in SECTIONS)}"
        )
    return tuple(section for section in SECTIONS if section.name in names)
