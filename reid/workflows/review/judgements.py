"""Turns answers into persons: same images, different images, and junk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NOBODY = -1


@dataclass(frozen=True)
class Facts:
    """What an answer states about images, by their numbers.

    Attributes:
        same: Groups of images of one person each.
        different: Pairs of images of two persons.
        junk: Images without a usable person.
    """

    same: tuple[tuple[int, ...], ...] = ()
    different: tuple[tuple[int, int], ...] = ()
    junk: tuple[int, ...] = ()


class Judgements:
    """What is known about N images.

    If answers contradict each other, the newer one counts; the part of the older one that does not
    fit is ignored and counted as a contradiction.

    Args:
        count: N.

    Attributes:
        person: (N,) a number for each person, without an order; -1: nothing is known of the image,
            or it is junk.
        junk: (N,) whether the image is junk.
        contradictions: Number of ignored parts of answers.
        changes: Grows whenever persons are joined or separated.
    """

    def __init__(self, count: int) -> None:
        self.person: npt.NDArray[np.int64] = np.full(count, NOBODY, np.int64)
        self.junk: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        self.contradictions = 0
        self.changes = 0
        self._members: dict[int, list[int]] = {}
        self._apart: dict[int, set[int]] = {}
        self._next = 0

    @classmethod
    def of(cls, count: int, facts: Sequence[Facts]) -> Judgements:
        """The judgements of all answers; `facts` are from the oldest to the newest."""
        found = cls(count)
        for each in reversed(facts):  # the first fact added wins, so the newest comes first
            found.add(each)
        return found

    def add(self, facts: Facts) -> bool:
        """Adds the facts that contradict nothing known; returns whether these were all."""
        before = self.contradictions
        for image in facts.junk:
            if self.person[image] == NOBODY:
                self.junk[image] = True
            else:
                self.contradictions += 1
        for group in facts.same:
            usable = self._without_junk(group)
            for image in usable[1:]:
                self._join(usable[0], image)
        for one, other in facts.different:
            pair = self._without_junk((one, other))
            if len(pair) == 2:
                self._separate(*pair)
        return self.contradictions == before

    def members(self, person: int) -> list[int]:
        """Images of a person, in no order."""
        return self._members[person]

    def persons(self, least: int = 2) -> list[int]:
        """Persons of whom at least so many images are known."""
        return [person for person, images in self._members.items() if len(images) >= least]

    def relation(self, one: int, other: int) -> bool | None:
        """Whether two images show the same person; None: not known."""
        a, b = int(self.person[one]), int(self.person[other])
        if a == NOBODY or b == NOBODY:
            return None
        if a == b:
            return True
        return False if b in self._apart[a] else None

    def are_apart(self, person: int, other: int) -> bool:
        """Whether two persons are known to be two."""
        return other in self._apart[person]

    def _without_junk(self, images: Iterable[int]) -> list[int]:
        images = list(images)
        usable = [image for image in images if not self.junk[image]]
        self.contradictions += len(images) - len(usable)
        return usable

    def _place(self, image: int) -> int:
        person = int(self.person[image])
        if person == NOBODY:
            person = self._next
            self._next += 1
            self.person[image] = person
            self._members[person] = [image]
            self._apart[person] = set()
        return person

    def _join(self, one: int, other: int) -> None:
        a, b = self._place(one), self._place(other)
        if a == b:
            return
        if b in self._apart[a]:
            self.contradictions += 1
            return
        if len(self._members[a]) < len(self._members[b]):
            a, b = b, a
        self.changes += 1
        moved = self._members.pop(b)
        self.person[moved] = a
        self._members[a] += moved
        for third in self._apart.pop(b):
            self._apart[third].discard(b)
            self._apart[third].add(a)
            self._apart[a].add(third)

    def _separate(self, one: int, other: int) -> None:
        a, b = self._place(one), self._place(other)
        if a == b:
            self.contradictions += 1
            return
        self.changes += b not in self._apart[a]
        self._apart[a].add(b)
        self._apart[b].add(a)
