"""The exact search in blocks: no process holds the candidates of more than two of them.

Each pair of blocks is compared once, by one process, as in a tournament: in each round every block
meets another one, so that the pairs of a round can be compared at the same time. What a block knows
after a round is a file; a comparison that was killed is done again from the files before it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.neighbors.candidates import Candidates
from reid.neighbors.exact import (
    BLOCK_SIZE,
    Compared,
    SearchTask,
    choose_plan,
    half_rounding_bound,
    largest_rounding,
    plans_after,
    rounding_bound,
    search_again,
    slack_of,
)
from reid.neighbors.kernels import Floats, Indices, all_finite, half_squared_norms
from reid.neighbors.plan import Plan
from reid.neighbors.projection import Lengths, project
from reid.neighbors.rescoring import rescore
from reid.neighbors.shards.folder import Facts
from reid.neighbors.shards.law import bytes_of_candidates, bytes_on_disk
from reid.neighbors.shards.steps import Shapes, Shards, Step, blocks_of
from reid.neighbors.tiles import search_between, search_rows
from reid.structures import ProgressBar

logger = logging.getLogger(__name__)

_LENGTH_ERROR = 1e-3
_PER_PROCESS = 4
_FEWEST_ROWS = 2 * BLOCK_SIZE


@dataclass(frozen=True)
class ListLengths:
    """How much of the lists is kept: their length, that of the half lists, and k2."""

    full: int
    half: int
    nearest: int

    @property
    def longest(self) -> int:
        """Neighbours that are searched."""
        return max(self.full, self.nearest)


class ShardedSearch:
    """Searches the neighbours of all rows, and leaves their lists in the folder.

    These are `lists`, `half_lists` and `nearest`: (N, length) int32 arrays.

    Args:
        shards: The processes.
        rows: (N, D) float32, mapped into memory, contiguous.
        lengths: Of the lists.
        memory: Bytes that the candidates of a process may take.
        block_rows: Most rows of a block; None: as many as the memory allows.
        half_precision: As in `nearest_neighbors`.
        dims: As in `nearest_neighbors`.
    """

    def __init__(
        self,
        shards: Shards,
        rows: Floats,
        lengths: ListLengths,
        memory: float,
        *,
        block_rows: int | None = None,
        half_precision: bool | None = None,
        dims: int | None = None,
    ) -> None:
        self._shards, self._folder = shards, shards.folder
        self._lengths = lengths
        self._task = SearchTask(rows, lengths.longest, BLOCK_SIZE, half_precision, "cpu", dims)
        self._memory, self._block_rows = memory, block_rows
        self._count, self._dim = rows.shape
        self._plan: Plan | None = None

    def run(self) -> None:
        """Does what is left; every process must call it.

        Raises:
            BlocksDone: See `Shards.run`.
            ValueError: A row is not finite or not of unit length.
        """
        blocks = blocks_of(self._count)
        self._read()
        self._shards.run(Step("plan", "Planning", 1, self._choose, then=self._tell))
        self._shards.run(Step("project", "Projecting", blocks, self._project, self._projected))
        self._shards.run(Step("within", "Searching in blocks", self.blocks, self._search_within))
        self._compare()
        self._shards.run(Step(
            "lists", "Choosing neighbours", self.blocks, self._choose_lists,
            self._list_shapes,
            after=lambda block: self._folder.remove_piece(self._candidates(self._rounds), block),
            drops=["compared", "rest", "norms", "plan", self._candidates(self._rounds)],
        ))  # fmt: skip

    @property
    def plan(self) -> Plan:
        """How candidates are found; known after the step `plan`."""
        if self._plan is None:
            facts = self._folder.done("plan")[0]
            (axes,) = self._folder.read_piece("plan", 0)
            dims = int(facts["dims"])
            self._plan = Plan(dims, int(facts["room"]), bool(facts["half"]), axes if dims else None)
        return self._plan

    @property
    def blocks(self) -> int:
        """How many blocks are compared: an even number, or 1."""
        return int(self._folder.done("plan")[0]["blocks"])

    @property
    def _rounds(self) -> int:
        return math.ceil(self._shards.share * (self.blocks - 1))

    @property
    def _kept(self) -> Mapping[str, int]:
        return {
            "lists": self._lengths.full,
            "half_lists": self._lengths.half,
            "nearest": self._lengths.nearest,
        }

    def _list_shapes(self) -> Shapes:
        return {name: ((self._count, length), np.int32) for name, length in self._kept.items()}

    def _read(self) -> None:
        """Measures all rows."""
        names, kinds = ("half_norms", "norms"), (np.float64, np.float32)
        self._shards.run(Step(
            "lengths", "Reading", blocks_of(self._count), self._measure,
            lambda: {name: ((self._count,), kind) for name, kind in zip(names, kinds, strict=True)},
        ))  # fmt: skip

    def _edges(self, block: int, blocks: int | None = None) -> tuple[int, int]:
        """The first row of a block, and behind its last."""
        blocks = blocks or self.blocks
        return self._count * block // blocks, self._count * (block + 1) // blocks

    def _measure(self, block: int) -> Facts:
        """Lengths of rows, and by how much bfloat16 moves them."""
        first, last = self._edges(block, blocks_of(self._count))
        part = self._task.rows[first:last]
        if not all_finite(part):
            wrong = first + int(np.flatnonzero(~np.isfinite(part).all(1))[0])
            raise ValueError(f"row {wrong:,}: expected finite numbers, got NaN or infinity")
        norms = half_squared_norms(part)
        far = np.flatnonzero(np.abs(np.sqrt(2 * norms) - 1) > _LENGTH_ERROR)
        if len(far):
            length = float(np.sqrt(2 * norms[far[0]]))
            raise ValueError(
                f"row {first + int(far[0]):,}: expected a vector of length 1, got {length:.4g}; "
                "divide each by its length"
            )
        self._folder.array("half_norms")[first:last] = norms
        self._folder.array("norms")[first:last] = norms
        moved = largest_rounding(part, torch.from_numpy(part).bfloat16())
        return {"largest": float(norms.max()), "moved": moved}

    def _choose(self, _: int) -> Facts:
        """The plan, and the number of blocks that the memory allows."""
        norms = self._folder.array("half_norms")
        plan = choose_plan(self._task, self._task.rows, norms, self._count)
        axes = np.empty((0, 0)) if plan.axes is None else plan.axes
        self._folder.write_piece("plan", 0, axes)
        rows = self._block_rows or int(self._memory / (2 * bytes_of_candidates(plan.room)))
        least = 2 * -(-self._count // (2 * max(rows, 1)))
        if self._block_rows is None:
            wanted = _PER_PROCESS * distributed.world_size()
            least = max(least, min(wanted, self._count // _FEWEST_ROWS // 2 * 2), 2)
        blocks = max(1, min(least, self._count // 2 * 2))
        return {"dims": plan.dims, "room": plan.room, "half": plan.half, "blocks": blocks}

    def _tell(self) -> None:
        """Logs what the work will take."""
        self._folder.refresh()
        pairs = self.blocks * (self.blocks - 1) // 2
        self._tell_size(f"{pairs:,} pairs of which are compared", 2)

    def _tell_size(self, work: str, held: int) -> None:
        """Logs what the work will take, where a process holds the candidates of `held` blocks."""
        count, plan, lengths = self._count, self.plan, self._lengths
        first, last = self._edges(0)
        memory = held * (last - first) * bytes_of_candidates(plan.room)
        disk = count * max(bytes_on_disk(
            self._dim, lengths.full, lengths.half, lengths.nearest, plan
        ).values())  # fmt: skip
        free = shutil.disk_usage(self._folder.path).free
        logger.info(
            "%s rows of %s numbers in %s blocks, %s. A process takes about %.1f GB for candidates, "
            "and half a GB for the program. The folder takes up to about %.1f GB; %.1f GB are free",
            f"{count:,}", f"{self._dim:,}", f"{self.blocks:,}", work, memory / 1e9, disk / 1e9,
            free / 1e9,
        )  # fmt: skip
        if disk > free:
            logger.warning("The disk may be too small. The run would stop with an error, and go on "
                           "once there is room")  # fmt: skip

    def _projected(self) -> Shapes:
        """The arrays of what is multiplied."""
        plan, kind = self.plan, np.uint16 if self.plan.half else np.float32
        if plan.dims:
            return {"compared": ((self._count, plan.dims + 1), kind),
                    "rest": ((self._count,), np.float32)}  # fmt: skip
        return {"compared": ((self._count, self._dim), kind)} if plan.half else {}

    def _project(self, block: int) -> Facts:
        """What is multiplied, of some rows."""
        first, last = self._edges(block, blocks_of(self._count))
        part, plan = self._task.rows[first:last], self.plan
        if plan.axes is not None:
            projected = project(part, plan.axes, plan.kind)
            self._multiplied()[first:last] = projected.rows
            self._folder.array("rest")[first:last] = projected.rest
            longest, whole, moved = astuple(projected.lengths)
            rest = float(projected.rest.max())
            return {"longest": longest, "whole": whole, "moved": moved, "rest": rest}
        if plan.half:
            self._multiplied()[first:last] = torch.from_numpy(part)
        return {}

    def _multiplied(self) -> Tensor:
        """The rows that are multiplied."""
        plan = self.plan
        if not plan.dims and not plan.half:
            return torch.from_numpy(self._task.rows)
        tensor = torch.from_numpy(self._folder.array("compared"))
        return tensor.view(torch.bfloat16) if plan.half else tensor

    def _most(self, step: str, fact: str) -> float:
        """The largest of a fact about the blocks of a step."""
        return max(facts[fact] for facts in self._folder.done(step).values() if fact in facts)

    def _bounded(self, plan: Plan, which: Indices) -> tuple[Tensor, float, Floats]:
        """See `Compared`."""
        bound = self._bound(plan)
        if plan.dims:
            rest = self._folder.array("rest")[which], self._most("project", "rest")
            return self._multiplied(), bound, slack_of(bound, *rest)
        tensor = torch.from_numpy(self._task.rows)
        if plan.half and not self.plan.dims:
            tensor = self._multiplied()
        return tensor, bound, slack_of(bound, np.zeros(len(which), np.float32), 0.0)

    def _bound(self, plan: Plan) -> float:
        """By how much scores may be too low."""
        largest = self._most("lengths", "largest")
        if plan.dims:
            lengths = Lengths(*(self._most("project", name) for name in Lengths.__annotations__))
            return lengths.bound(plan.dims + 1, plan.kind) + rounding_bound(4, largest)
        if plan.half:
            return half_rounding_bound(self._dim, largest, self._most("lengths", "moved"))
        return rounding_bound(self._dim, largest)

    def _compared(self) -> Compared:
        norms = self._folder.array("half_norms"), self._folder.array("norms")
        return Compared(*norms, 1.0, self._bounded)

    def _empty(self, *blocks: int) -> Candidates:
        """Room for the candidates of some blocks."""
        which = np.concatenate([np.arange(*self._edges(b), dtype=np.int32) for b in blocks])
        slack = self._bounded(self.plan, which)[2]
        largest = self._most("lengths", "largest")
        return Candidates.empty(self.plan.room, self._count, slack, largest, self._task.k)

    @staticmethod
    def _candidates(number: int) -> str:
        """The name of what the blocks know after a round."""
        return f"candidates-{number:06d}"

    def _search_within(self, block: int) -> None:
        first, last = self._edges(block)
        found = self._empty(block)
        rows, norms = self._multiplied()[first:last], self._folder.array("norms")[first:last]
        search_rows(rows, norms, 0, BLOCK_SIZE, found, None)
        np.add(found.index, first, out=found.index)
        self._folder.write_piece(self._candidates(0), block, *_stored(found))

    def _compare(self) -> None:
        """Compares each pair of blocks, round by round."""
        rounds = [number for number in range(1, self._rounds + 1) if not self._finished(number)]
        left = {number: self.blocks // 2 - len(self._folder.done(f"round-{number}"))
                for number in rounds}  # fmt: skip
        if not rounds:
            return
        with self._shards.bar("Comparing pairs of blocks") as bar:
            done, total = 0, sum(left.values())
            for number in rounds:
                self._shards.run(self._round(number), partial(_show_part, bar, done, total))
                done += left[number]

    def _finished(self, number: int) -> bool:
        return self._shards.finished(f"round-{number}")

    def _round(self, number: int) -> Step:
        pairs = pairs_of_round(self.blocks, number)
        before = self._candidates(number - 1)

        def compare(place: int) -> None:
            one, other = pairs[place]
            ends = self._edges(one), self._edges(other)
            found, size = self._empty(one, other), ends[0][1] - ends[0][0]
            parts = (one, slice(0, size)), (other, slice(size, None))
            for block, part in parts:
                self._folder.read_into(before, block, *_stored(found, part))
            search_between(
                self._multiplied(), self._folder.array("norms"), *ends, BLOCK_SIZE, found
            )
            for block, part in parts:
                after = self._candidates(number)
                self._folder.write_piece(after, block, *_stored(found, part))

        def tidy(place: int) -> None:
            for block in pairs[place]:
                self._folder.remove_piece(before, block)

        return Step(
            f"round-{number}", f"Round {number}", len(pairs), compare, after=tidy, drops=[before]
        )

    def _choose_lists(self, block: int) -> Facts:
        """The lists of a block, each certain to be exact."""
        first, last = self._edges(block)
        found = self._empty(block)
        self._folder.read_into(self._candidates(self._rounds), block, *_stored(found))
        which, half_norms = np.arange(first, last, dtype=np.int32), self._folder.array("half_norms")
        bound = self._bounded(self.plan, which[:0])[1]
        lists, doubtful = rescore(self._task.rows, half_norms, which, found, bound, 1.0)
        del found
        again = plans_after(self.plan, self._task.k)
        lists[doubtful] = search_again(self._task, again, self._compared(), which[doubtful])
        for name, length in self._kept.items():
            self._folder.array(name)[first:last] = lists[:, :length]
        return {"again": int(doubtful.sum())}


def pairs_of_round(blocks: int, number: int) -> list[tuple[int, int]]:
    """The pairs of blocks that meet in a round of a tournament, from 1 to `blocks` - 1.

    The last block stays, the others go round a circle and meet those opposite.

    Args:
        blocks: An even number.
        number: Of the round.
    """
    around = blocks - 1
    pairs = [(number % around, around)]
    for step in range(1, blocks // 2):
        one, other = (number + step) % around, (number - step) % around
        pairs.append((min(one, other), max(one, other)))
    return pairs


def _show_part(bar: ProgressBar, before: int, total: int, done: int, _: int) -> None:
    bar(before + done, total)


def _stored(found: Candidates, part: slice = slice(None)) -> tuple[Floats | Indices, ...]:
    """What changes when candidates are offered."""
    return found.scores[part], found.index[part], found.filled[part], found.lost[part]
