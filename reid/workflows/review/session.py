"""A review: answers on disk, the judgements, the next question, figures, the list."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reid.evaluation.matches import camera_name
from reid.files import printable
from reid.structures import FeatureSet
from reid.workflows.review.asker import Asker
from reid.workflows.review.commands import next_commands
from reid.workflows.review.figures import (
    LabelledFigures,
    RandomFigures,
    labelled_figures,
    random_figures,
)
from reid.workflows.review.history import History
from reid.workflows.review.journal import Answer, Journal, places_of
from reid.workflows.review.judgements import Facts, Judgements
from reid.workflows.review.lists import LabelledSplits, LabelList, split_labels
from reid.workflows.review.question import AnswerError, Question
from reid.workflows.review.source import Source
from reid.workflows.review.thumbnails import Thumbnails
from reid.workflows.review.views import VIEWS, View

logger = logging.getLogger(__name__)

THUMBNAILS = "thumbnails"
_MOST_OPEN = 8
_OTHER_SITE = (
    "the model recognises cameras by the folder of their images. The list is in another folder, so "
    "--eval-only gives other figures than the page; write the list into that folder with --labels "
    "to get the same figures"
)


class StaleQuestion(RuntimeError):  # noqa: N818  (what it says, not what went wrong)
    """An answer to a question that is no longer open."""


class ReviewSession:
    """Everything that the page asks for; its methods may be called from several threads.

    Args:
        source: The images.
        folder: Of the review, locked by this process.
        labels: The list to write.
        test_share: Of the persons; see `LabelledSplits`.

    Raises:
        DataError: The journal is of something else, or broken.
        OutputError: It cannot be written, or `labels` is another's file.
    """

    def __init__(self, source: Source, folder: Path, labels: Path, test_share: float) -> None:
        self.source = source
        self.labels = LabelList(labels, folder)
        self.labels.check()
        self.journal = Journal(folder)
        self.thumbnails = Thumbnails(source.paths, folder / THUMBNAILS)
        self._test_share = test_share
        self._places = places_of(source.paths)
        self._history = History(folder)
        self._lock = threading.Lock()
        self._figures_lock = threading.Lock()
        self._figures: tuple[int, dict[str, Any]] | None = None
        self._open: dict[str, Question] = {}
        self._facts: list[Facts] = []
        self.judgements = Judgements(len(source.records))
        self.asker = Asker(source, self.judgements)
        self._replay()

    def close(self) -> None:
        """Lets the journal go."""
        self.journal.close()

    def question(self, view: View) -> dict[str, Any]:
        """The next question of a view, with the counts, for the page."""
        with self._lock:
            return self._page(view)

    def answer(
        self, key: str, verdict: str, marked: Sequence[int], chosen: Sequence[int], view: View
    ) -> dict[str, Any]:
        """Puts an answer on disk, and gives the next question.

        Args:
            key: Of the question, as `question` gave it.
            verdict: See `VERDICTS`.
            marked: Numbers of images.
            chosen: Places of other clusters.
            view: Of the next question.

        Raises:
            StaleQuestion: The question is not open any more.
            AnswerError: The answer does not fit the question; it is asked still.
            OutputError: It could not be written, and does not count.
        """
        with self._lock:
            question = self._open.get(key)
            if question is None:
                raise StaleQuestion("This question was answered already, or in another window")
            facts = question.facts(verdict, marked, chosen)
            answer = self._as_answer(question, verdict, marked, facts)
            self.journal.append(answer)
            self._open.clear()
            self._facts.append(facts)
            self._note(answer)
            if not self.judgements.add(facts):  # a contradiction: the newer answer must win
                self._judge_anew()
            return self._page(view)

    def undo(self, view: View) -> dict[str, Any]:
        """Takes the last answer back; gives what `question` gives, and `undone` in words.

        Raises:
            OutputError: This could not be written.
        """
        with self._lock:
            answer = self.journal.undo()
            if answer is None:
                raise AnswerError("There is no answer to undo")
            self._open.clear()
            self._replay()
            found = self._page(view)
        found["undone"] = f"Undone: {answer.verdict} ({answer.kind})"
        return found

    def figures(self) -> dict[str, Any]:
        """Figures by the answers so far, for the page; computed once for each state of these."""
        with self._figures_lock:
            with self._lock:
                key = self.journal.next_number * 10**9 + len(self.journal.answers)
                if self._figures is not None and self._figures[0] == key:
                    return self._figures[1]
                answers = len(self.journal.answers)
                splits = self._splits()
                sampled = self._sampled()
                unjudged = len(self.asker.unjudged_persons())
            labelled = self._labelled(splits)
            history = self._history.with_entry(answers, labelled, sampled)
            found = {
                "answers": answers,
                "labelled": _as_dict(labelled),
                "random": _as_dict(sampled),
                "unjudged": unjudged,
                "history": history,
                "settings": self._settings(),
            }
            self._figures = key, found
            return found

    def write(self) -> dict[str, Any]:
        """Writes the list; tells what it holds and which commands take it.

        Raises:
            OutputError: It cannot be written, or another's file is there.
        """
        with self._lock:
            splits = self._splits()
            lost = self.labels.write(splits, self.source.records)
        notes = [lost] if lost else []
        outside = self.labels.needs_outside(self.source.records)
        if self.source.sites and str(self.labels.path.parent.resolve()) not in self.source.sites:
            notes.append(_OTHER_SITE)
        return {
            "path": printable(str(self.labels.path)),
            "summary": _summary(splits),
            "note": "; ".join(notes),
            "commands": next_commands(self.source, self.labels.path, splits, outside),
        }

    def _page(self, view: View) -> dict[str, Any]:
        question = self.asker.next(view, len(self.journal.answers))
        found: dict[str, Any] = {"view": view, "views": VIEWS, "counts": self._counts()}
        if question is None:
            return {**found, "question": None}
        key = secrets.token_hex(8)
        while len(self._open) >= _MOST_OPEN:
            self._open.pop(next(iter(self._open)))
        self._open[key] = question
        return {**found, "question": {"key": key, **self._shown(question)}}

    def _shown(self, question: Question) -> dict[str, Any]:
        return {
            "kind": question.kind,
            "images": [self._image(image) for image in question.images],
            "anchor": [self._image(image) for image in question.anchor],
            "others": [[self._image(image) for image in group] for group in question.others],
            "about": question.about,
            "marked": self._known_matches(question),
        }

    def _known_matches(self, question: Question) -> list[int]:
        """Places of a random sample that earlier answers settle; the page shows them marked."""
        if question.kind != "random":
            return []
        (query,) = question.anchor
        return [i for i in question.images if self.judgements.relation(query, i)]

    def _image(self, image: int) -> dict[str, Any]:
        record = self.source.records[image]
        return {
            "number": image,
            "camera": printable(camera_name(record)),
            "name": printable(os.path.basename(record.path)),  # noqa: PTH119
        }

    def _counts(self) -> dict[str, Any]:
        persons = self.judgements.persons()
        return {
            "run": printable(self.source.name),
            "images": len(self.source.records),
            "answers": len(self.journal.answers),
            "persons": len(persons),
            "labelled": sum(len(self.judgements.members(person)) for person in persons),
            "junk": int(self.judgements.junk.sum()),
            "contradictions": self.judgements.contradictions,
            "clusters_from": self.source.clusters_from,
        }

    def _settings(self) -> str:
        """What the figures respect, in a sentence."""
        spec = self.source.config.test.evaluator
        options = {key: value for key, value in spec.items() if key != "name"}
        given = ", ".join(f"{key.upper()} {value}" for key, value in options.items())
        flip = "with" if self.source.config.test.flip else "without"
        return (
            f"Features {flip} flip-test (TEST.FLIP). Figures on labelled images are by "
            f"{spec['name']}{f' ({given})' if given else ''}; random samples are ranked by "
            "distance alone, without re-ranking or query expansion."
        )

    def _as_answer(
        self, question: Question, verdict: str, marked: Sequence[int], facts: Facts
    ) -> Answer:
        shown = question.shown
        place = {image: number for number, image in enumerate(shown)}

        def places(images: Sequence[int]) -> tuple[int, ...]:
            return tuple(place[image] for image in images)

        return Answer(
            self.journal.next_number,
            question.kind,
            verdict,
            tuple(self.source.records[image].path for image in shown),
            places(question.asked(verdict, marked)),
            places(marked),
            tuple(places(group) for group in facts.same),
            tuple((place[one], place[other]) for one, other in facts.different),
            places(facts.junk),
            self.source.fingerprint,
        )

    def _replay(self) -> None:
        """Rebuilds everything that follows from the answers."""
        self._facts, unknown = [], 0
        for answer in self.journal.answers:
            images = [self._place(path) for path in answer.images]
            unknown += images.count(-1)
            self._facts.append(_facts_of(answer, images))
        if unknown:
            logger.warning(
                "%s images in %s do not belong to this run and are ignored",
                f"{unknown:,}",
                self.journal.path,
            )
        self._judge_anew()
        self.asker.forget(self.judgements)
        for answer in self.journal.answers:
            self._note(answer)

    def _judge_anew(self) -> None:
        self.judgements = Judgements.of(len(self.source.records), self._facts)
        self.asker.judgements = self.judgements

    def _place(self, path: str) -> int:
        return self._places.get(os.path.abspath(path), -1)  # noqa: PTH100

    def _note(self, answer: Answer) -> None:
        shown = [self._place(path) for path in answer.images]
        asked = [shown[place] for place in answer.asked]
        if -1 in shown or (answer.kind == "random" and answer.model != self.source.fingerprint):
            return  # another model ranks differently, so its samples do not count here
        self.asker.note(answer.kind, shown, asked, answer.verdict)

    def _splits(self) -> LabelledSplits:
        groups = [group for facts in self._facts for group in facts.same]
        return split_labels(self.judgements, self.source.records, groups, self._test_share)

    def _labelled(self, splits: LabelledSplits) -> LabelledFigures:
        return labelled_figures(
            self._features(splits.query, splits),
            self._features(splits.gallery, splits),
            [self.source.records[image].path for image in splits.query],
            [self.source.records[image].path for image in splits.gallery],
            self.source.evaluator,
        )

    def _features(self, images: Sequence[int], splits: LabelledSplits) -> FeatureSet:
        rows = torch.tensor(images, dtype=torch.int64)
        pids = torch.from_numpy(splits.pid)[rows]
        return replace(self.source.features[rows], pids=pids)

    def _sampled(self) -> RandomFigures:
        """Figures of the random samples, judged by all answers so far."""
        lists, skipped, junk = [], 0, 0
        judgements = self.judgements
        for answer in self.journal.answers:
            whole = len(answer.asked) == len(answer.images) - 1
            if answer.kind != "random" or answer.model != self.source.fingerprint or not whole:
                continue
            query, *places = (self._place(path) for path in answer.images)
            if answer.verdict == "next":
                skipped += 1
            elif judgements.junk[query]:
                junk += 1
            else:
                usable = [image for image in places if not judgements.junk[image]]
                lists.append([judgements.relation(query, image) is True for image in usable])
        return random_figures(lists, skipped, junk)


def _facts_of(answer: Answer, images: Sequence[int]) -> Facts:
    """What an answer says of images by number, -1 where there is no such image."""
    groups = [[images[place] for place in group] for group in answer.same]
    pairs = [(images[one], images[other]) for one, other in answer.different]
    return Facts(
        tuple(tuple(image for image in group if image >= 0) for group in groups),
        tuple(pair for pair in pairs if min(pair) >= 0),
        tuple(images[place] for place in answer.junk if images[place] >= 0),
    )


def _as_dict(figures: LabelledFigures | RandomFigures) -> dict[str, Any]:
    return {
        name: value.as_dict() if hasattr(value, "as_dict") else value
        for name, value in vars(figures).items()
    }


def _summary(splits: LabelledSplits) -> str:
    return (
        f"{splits.persons:,} persons: {splits.train_persons:,} for training "
        f"({len(splits.train):,} images), {splits.test_persons:,} for tests "
        f"({len(splits.query):,} queries, {len(splits.gallery):,} gallery images, "
        f"{splits.distractors:,} persons of one camera among them)"
    )
