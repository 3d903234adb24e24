"""The approximate search of `reid.neighbors.inverted` in blocks, on arrays that are on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.neighbors.exact import first_plan, slack_of
from reid.neighbors.inverted import (
    Centres,
    InvertedFile,
    Sample,
    Searched,
    count_visitors,
    tell,
    visited_lists,
)
from reid.neighbors.kernels import Floats, Indices
from reid.neighbors.order import rename
from reid.neighbors.plan import Plan
from reid.neighbors.shards.folder import Facts
from reid.neighbors.shards.law import bytes_of_candidates
from reid.neighbors.shards.search import ShardedSearch
from reid.neighbors.shards.steps import Shapes, Step, blocks_of

_FILE = tuple(InvertedFile.__annotations__)
_IN_ORDER = "in_order", "norms_in_order"
_FEWEST_ROWS = 8192


class ShardedInvertedFile(ShardedSearch):
    """Searches the neighbours of all rows among the nearest lists of an inverted file.

    It leaves the same arrays as `ShardedSearch`. A block is some rows that follow each other in the
    order of the lists; blocks do not depend on each other. Where rows would have to visit many
    lists, the search is exact.
    """

    def run(self) -> None:
        """See `ShardedSearch.run`."""
        blocks = blocks_of(self._count)
        self._read()
        self._shards.run(
            Step("centres", "Finding centres", 1, self._find_centres, then=self._tell_visits)
        )
        if not self._visits:
            super().run()
            return
        self._shards.run(Step("assign", "Assigning rows to lists", blocks, self._assign,
                              self._assigned_shapes))  # fmt: skip
        self._shards.run(Step("file", "Making lists", 1, self._make_file, self._file_shapes,
                              drops=["home", "near"]))  # fmt: skip
        self._shards.run(Step("move", "Ordering rows by list", blocks, self._move,
                              self._moved_shapes))  # fmt: skip
        self._shards.run(Step(
            "lists", "Searching in lists", self.blocks, self._search_lists, self._list_shapes,
            then=self._tell_share, drops=["norms", "centres", *_FILE, *_IN_ORDER],
        ))  # fmt: skip

    @property
    def plan(self) -> Plan:
        """All numbers are multiplied, unless the search is exact."""
        if not self._visits:
            return super().plan
        return first_plan(replace(self._task, half_precision=bool(self._noted("half"))))

    @property
    def blocks(self) -> int:
        """How many blocks are searched."""
        return self._noted("blocks") if self._visits else super().blocks

    @property
    def _visits(self) -> int:
        """How many lists a row visits; 0: the search is exact."""
        return self._noted("visits")

    def _noted(self, fact: str) -> int:
        return int(self._folder.done("centres")[0][fact])

    def _bounded(self, plan: Plan, which: Indices) -> tuple[Tensor, float, Floats]:
        """The rows, which are converted tile by tile, unless the search is exact."""
        if self._folder.done("centres") and not self._visits:
            return super()._bounded(plan, which)
        bound = self._bound(plan)
        slack = slack_of(bound, np.zeros(len(which), np.float32), 0.0)
        return torch.from_numpy(self._task.rows), bound, slack

    def _find_centres(self, _: int) -> Facts:
        plan = first_plan(self._task)
        sample = Sample.of(self._task, plan, self._compared())
        centres, visits = visited_lists(torch.from_numpy(self._task.rows), plan.kind, sample)
        means = centres.rows.float().numpy()
        self._folder.write_piece(
            "centres", 0, means, sample.choosing, sample.measured, sample.lists
        )
        rows = self._block_rows or int(self._memory / bytes_of_candidates(plan.room))
        blocks = blocks_of(self._count, max(rows, 1))
        if self._block_rows is None:
            blocks = max(blocks, min(distributed.world_size(), self._count // _FEWEST_ROWS))
        return {"visits": visits, "lists": len(means), "half": plan.half, "room": plan.room,
                "blocks": blocks}  # fmt: skip

    def _tell_visits(self) -> None:
        """Logs what the work will take, unless the search is exact."""
        if not self._visits:
            return
        visits, lists = f"{self._visits:,}", f"{self._noted('lists'):,}"
        self._tell_size(f"each row of which is compared with {visits} of {lists} lists", 1)

    def _centres(self) -> Centres:
        means = next(self._folder.read_piece("centres", 0))
        return Centres.of(torch.from_numpy(means), self.plan.kind)

    def _part(self, block: int) -> slice:
        return slice(*self._edges(block, blocks_of(self._count)))

    def _assigned_shapes(self) -> Shapes:
        room = self._centres().room(self._visits)
        return {"home": ((self._count,), np.int32), "near": ((self._count, room), np.int32)}

    def _assign(self, block: int) -> Facts:
        part, folder = self._part(block), self._folder
        rows, largest = torch.from_numpy(self._task.rows[part]), self._most("lengths", "largest")
        home, near = self._centres().nearest(rows, self._visits, largest)
        folder.array("home")[part], folder.array("near")[part] = home, near
        return {"visitors": count_visitors(home, near)}

    def _file_shapes(self) -> Shapes:
        lists = len(self._centres().norms)
        noted = self._folder.done("assign").values()
        visitors = sum(int(facts["visitors"]) for facts in noted if "visitors" in facts)
        return {
            "order": ((self._count,), np.int32), "edges": ((lists + 1,), np.int64),
            "visitors": ((visitors,), np.int32), "starts": ((lists + 1,), np.int64),
        }  # fmt: skip

    def _file(self) -> InvertedFile:
        return InvertedFile(*(self._folder.array(name) for name in _FILE))

    def _make_file(self, _: int) -> None:
        self._file().fill(self._folder.array("home"), self._folder.array("near"))

    def _in_order(self) -> Tensor:
        rows = torch.from_numpy(self._folder.array("in_order"))
        return rows.view(torch.bfloat16) if self.plan.half else rows

    def _moved_shapes(self) -> Shapes:
        kind = np.uint16 if self.plan.half else np.float32
        return {"in_order": ((self._count, self._dim), kind),
                "norms_in_order": ((self._count,), np.float32)}  # fmt: skip

    def _move(self, block: int) -> None:
        part, norms = self._part(block), self._folder.array("norms")
        which = self._folder.array("order")[part]
        self._in_order()[part] = torch.from_numpy(self._task.rows[which]).to(self.plan.kind)
        self._folder.array("norms_in_order")[part] = norms[which]

    def _search_lists(self, block: int) -> Facts:
        first, last = self._edges(block)
        lists, plan = self._file(), self.plan
        searched = Searched(self._task, plan, self._compared(), self._bound(plan))
        found = searched.empty(last - first)
        norms = self._folder.array("norms_in_order")
        lists.search(self._in_order(), norms, first, found, None)
        rename(found.index, found.filled, lists.order)
        which: Indices = lists.order[first:last]
        nearest = searched.lists(which, found)
        for name, length in self._kept.items():
            self._folder.array(name)[which] = nearest[:, :length]
        return {}

    def _tell_share(self) -> None:
        _, *arrays = self._folder.read_piece("centres", 0)
        sample = Sample(*arrays)
        names = self._kept.items()
        longest = max(names, key=lambda item: item[1])[0]
        lists = self._folder.array(longest)[sample.measured]
        tell(sample, lists, self._visits, self._noted("lists"))
