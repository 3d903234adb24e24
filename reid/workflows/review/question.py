"""A question, and the facts that each answer states about its images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from reid.workflows.review.judgements import Facts

Kind = Literal["cluster", "pair", "persons", "random"]
Verdict = Literal["same", "different", "junk", "merge", "split", "next"]

VERDICTS: dict[str, tuple[str, ...]] = {
    "cluster": ("same", "different", "junk", "merge", "split", "next"),
    "pair": ("same", "different", "junk", "next"),
    "persons": ("same", "different", "junk", "next"),
    "random": ("same", "different", "junk", "next"),
}


class AnswerError(ValueError):
    """An answer does not fit its question; says what to do."""


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        kind: `cluster`: do these images show one person? `pair`: do these two? `persons`: are two
            labelled persons one? `random`: which of these show the same person as the first image?
        images: Numbers of the images that can be marked.
        anchor: Images to compare them with. Of a cluster: known images of its person. Of two
            persons: the first one. Of a random sample: the sampled image.
        others: In a `cluster`, some images of each of the nearest other clusters.
        about: Further facts that the page shows, by name.
    """

    kind: Kind
    images: tuple[int, ...]
    anchor: tuple[int, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> tuple[int, ...]:
        """All images, each once: of the anchor, of the question, of the other clusters."""
        others = (image for group in self.others for image in group)
        return tuple(dict.fromkeys((*self.anchor, *self.images, *others)))

    def facts(self, verdict: str, marked: Collection[int], chosen: Collection[int]) -> Facts:
        """The facts that an answer states.

        Args:
            verdict: One of `VERDICTS`.
            marked: Of `images`.
            chosen: Places in `others`.

        Raises:
            AnswerError: The verdict does not fit this question or the marks.
        """
        if verdict not in VERDICTS[self.kind]:
            allowed = ", ".join(VERDICTS[self.kind])
            raise AnswerError(f"expected one of {allowed} for this question, got {verdict!r}")
        if not set(marked) <= set(self.images) or len(set(marked)) != len(marked):
            raise AnswerError("marked: expected numbers of this question's images, each once")
        if not set(chosen) <= set(range(len(self.others))):
            raise AnswerError("chosen: expected places of this question's other clusters")
        if chosen and verdict not in ("merge", "next"):
            raise AnswerError("Other clusters are marked: press m to merge, or remove the marks")
        if verdict == "next":
            return Facts()
        given = [image for image in self.images if image in marked]
        rest = [image for image in self.images if image not in marked]
        if verdict == "junk":
            return Facts(junk=self._junk(given))
        if self.kind == "cluster":
            return self._of_cluster(verdict, given, rest, chosen)
        if self.kind == "random":
            return self._of_random(verdict, given, rest)
        if given:
            raise AnswerError("Marks are for junk here: press j, or remove the marks")
        one, other = (*self.anchor[:1], *self.images)[:2]
        return (
            Facts(same=((one, other),)) if verdict == "same" else Facts(different=((one, other),))
        )

    def asked(self, verdict: str, marked: Collection[int]) -> tuple[int, ...]:
        """The images that need not be asked about in this way again."""
        if verdict == "junk" and marked and self.kind in ("cluster", "random"):
            return tuple(image for image in self.images if image in marked)
        return self.images

    def _junk(self, marked: list[int]) -> tuple[int, ...]:
        if marked:
            return tuple(marked)
        if self.kind == "random":
            return self.anchor
        if self.kind == "persons":
            raise AnswerError("Mark the images that are junk first")
        return self.images

    def _of_cluster(
        self, verdict: str, marked: list[int], rest: list[int], chosen: Collection[int]
    ) -> Facts:
        person = (*self.anchor, *rest)
        if verdict == "different":
            if marked:
                raise AnswerError(
                    "Some images are marked: press s (the others are one person) or p (two "
                    "persons), or remove the marks and press d (a mix)"
                )
            return Facts()
        if not person:
            raise AnswerError("All images are marked and none is left; remove some marks")
        apart = tuple((person[0], image) for image in marked)
        if verdict == "merge":
            if not chosen:
                raise AnswerError("Mark the clusters below that show the same person, then press m")
            merged = [image for place in sorted(chosen) for image in self.others[place]]
            return Facts(same=(tuple(dict.fromkeys((*person, *merged))),), different=apart)
        if verdict == "split":
            if not marked or not rest:
                raise AnswerError("Mark the images of one person, but not those of the other")
            return Facts(same=(person, tuple(marked)), different=apart[:1])
        if len(person) < 2:
            raise AnswerError("Only one image is unmarked; remove marks, or press n")
        return Facts(same=(person,), different=apart)

    def _of_random(self, verdict: str, marked: list[int], rest: list[int]) -> Facts:
        (query,) = self.anchor
        if verdict == "same":
            if not marked:
                raise AnswerError("Mark the images of the same person, or press d if there is none")
            apart = tuple((query, image) for image in rest)
            return Facts(same=((query, *marked),), different=apart)
        if marked:
            raise AnswerError("Marked images are the same person: press s, or remove the marks")
        return Facts(different=tuple((query, image) for image in rest))
