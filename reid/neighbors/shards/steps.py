"""Steps whose blocks are shared by processes, noted when finished, and never done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from reid import distributed
from reid.neighbors.kernels import run_in_pieces
from reid.neighbors.shards.folder import Facts, WorkFolder
from reid.structures import ProgressBar

ROWS = 65_536
"""Rows of a block, in steps that take memory for the rows of a block only."""

_WHOLE = -1
Bar = Callable[[str], AbstractContextManager[ProgressBar]]
Shapes = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]


class BlocksDone(Exception):  # noqa: N818  (no error: the caller asked for it)
    """As many blocks as were wanted are done; the same call goes on later."""


@dataclass(frozen=True)
class Step:
    """A part of the work, in blocks that do not depend on each other.

    Attributes:
        name: A short word for the journal.
        title: For the progress bar.
        blocks: How many.
        work: Does a block, given its number; gives facts about it.
        makes: Gives the shapes and types of the arrays that it writes, once it begins.
        after: Tidies up after a block that was noted as finished.
        then: What the main process does once all blocks are finished.
        drops: Arrays and pieces that no later step reads.
    """

    name: str
    title: str
    blocks: int
    work: Callable[[int], Facts | None]
    makes: Callable[[], Shapes] = dict
    after: Callable[[int], None] | None = None
    then: Callable[[], None] | None = None
    drops: Sequence[str] = ()


@dataclass
class Shards:
    """The processes that work in a folder.

    Attributes:
        folder: Theirs.
        bar: Shows the progress of a step, given its title.
        left: Blocks that may still be done; None: all.
        share: Of the rounds in which blocks are compared. Below 1 only to measure times: neighbours
            are then missed.
        seconds: What each step took in this run.
    """

    folder: WorkFolder
    bar: Bar
    left: int | None = None
    share: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)

    def finished(self, name: str) -> bool:
        """Whether a step is finished."""
        return _WHOLE in self.folder.done(name)

    def run(self, step: Step, progress: ProgressBar | None = None) -> None:
        """Does what is left of a step; every process must call it.

        Args:
            step: The step.
            progress: Called with (blocks done, blocks that were left); None: a bar of its own.

        Raises:
            BlocksDone: Blocks are left, but as many as were wanted are done.
            OutputError: The disk is full.
        """
        folder = self.folder
        if self.finished(step.name):
            folder.remove(*step.drops)
            return
        started = time.perf_counter()
        if distributed.is_main() and not folder.done(step.name):
            for array, (shape, dtype) in step.makes().items():
                folder.make(array, shape, dtype)
        todo = distributed.broadcast_object(
            [block for block in range(step.blocks) if block not in folder.done(step.name)]
        )
        now = todo if self.left is None else todo[: self.left]
        if progress is None:
            with self.bar(step.title) as progress:
                self._work(step, now, len(todo), progress)
        else:
            self._work(step, now, len(todo), progress)
        distributed.barrier()
        folder.refresh()
        self.seconds[step.name] = time.perf_counter() - started
        if self.left is not None:
            self.left -= len(now)
        if len(now) < len(todo):
            raise BlocksDone
        if distributed.is_main():
            if step.then is not None:
                step.then()
            folder.note(step.name, _WHOLE)
        distributed.barrier()
        folder.refresh()
        folder.remove(*step.drops)

    def _work(self, step: Step, now: list[int], left: int, progress: ProgressBar) -> None:
        """Does this process's share of the blocks."""
        mine = now[distributed.rank() :: distributed.world_size()]
        for place, block in enumerate(mine, 1):
            self.folder.note(step.name, block, step.work(block))
            if step.after is not None:
                step.after(block)
            progress(place * len(now) // len(mine), left)


def blocks_of(count: int, rows: int = ROWS) -> int:
    """How many blocks of at most so many rows."""
    return -(-count // rows)


def run_rows(
    kernel: Callable[..., None], first: int, last: int, operations: float, *arguments: Any
) -> None:
    """`run_in_pieces` for the rows from `first` to `last`."""
    run_in_pieces(
        lambda start, stop, *others: kernel(first + start, first + stop, *others),
        last - first, operations, *arguments,
    )  # fmt: skip
