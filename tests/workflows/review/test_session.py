"""A review from the first answer to the list, by one who knows the truth."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid.data.datasets.csv_dataset import CSV
from reid.files import OutputError
from reid.structures import ImageRecord
from reid.workflows.review.judgements import Facts, Judgements
from reid.workflows.review.lists import camera_texts, split_labels
from reid.workflows.review.session import ReviewSession, StaleQuestion
from reid.workflows.review.source import Source
from reid.workflows.review.views import View

IMAGES_OF_A_PERSON = 6


def reply(question: dict[str, Any]) -> tuple[str, list[int]]:
    """What a person without a fault says."""
    truth = {i["number"]: i["number"] // IMAGES_OF_A_PERSON
             for i in (*question["anchor"], *question["images"])}  # fmt: skip
    images = [i["number"] for i in question["images"]]
    anchor = [i["number"] for i in question["anchor"]]
    if question["kind"] in ("pair", "persons"):
        one, other = (*anchor[:1], *images)[:2]
        return ("same" if truth[one] == truth[other] else "different"), []
    if question["kind"] == "random":
        marked = [i for i in images if truth[i] == truth[anchor[0]]]
        return ("same" if marked else "different"), marked
    who = truth[anchor[0]] if anchor else Counter(truth[i] for i in images).most_common(1)[0][0]
    marked = [i for i in images if truth[i] != who]
    return ("next", []) if len(images) - len(marked) + len(anchor) < 2 else ("same", marked)


def answer_all(session: ReviewSession, view: View, most: int = 1000) -> int:
    page = session.question(view)
    for count in range(most):
        question = page["question"]
        if question is None:
            return count
        verdict, marked = reply(question)
        page = session.answer(question["key"], verdict, marked, [], view)
    return most


def state(session: ReviewSession) -> Any:
    persons = [sorted(session.judgements.members(p)) for p in session.judgements.persons(1)]
    page = session.question("auto")
    question = {k: v for k, v in page["question"].items() if k != "key"}
    return sorted(persons), page["counts"], question


def test_every_view_comes_to_an_end_and_tells_the_truth(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession]
) -> None:
    session = open_session(make_source(noise=0.6, wrong=0.2))
    for view in ("clusters", "sure", "doubtful", "random", "persons"):
        assert answer_all(session, view) < 1000
        assert session.question(view)["question"] is None
    assert session.judgements.contradictions == 0
    for person in session.judgements.persons():
        members = session.judgements.members(person)
        assert len({image // IMAGES_OF_A_PERSON for image in members}) == 1
    assert session.figures()["random"]["answered"] == 72
    assert len(session.judgements.persons()) == 12
    assert session.figures()["unjudged"] == 0


def test_undo_is_as_if_nothing_was_said_and_a_new_start_goes_on(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession]
) -> None:
    source = make_source(wrong=0.2)
    session = open_session(source)
    seen = [state(session)]
    for _ in range(25):
        answer_all(session, "auto", 1)
        seen.append(state(session))
    session.close = lambda: None  # type: ignore[method-assign]
    session.journal.close()
    again = open_session(source)
    assert state(again) == seen[-1]
    for expected in reversed(seen[:-1]):
        again.undo("auto")
        assert state(again) == expected
    assert again.figures()["answers"] == 0


def test_answers_outlive_their_model(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = make_source()
    session = open_session(source)
    answer_all(session, "random", 10)
    persons = len(session.judgements.persons())
    assert session.figures()["random"]["answered"] == 10
    session.journal.close()
    session.close = lambda: None  # type: ignore[method-assign]
    other = replace(
        source, fingerprint="another", records=source.records[6:], features=source.features[6:],
        cluster=source.cluster[6:], confidence=source.confidence[6:],
        neighbors=np.maximum(source.neighbors[6:] - 6, -1), likeness=source.likeness[6:],
    )  # fmt: skip
    again = open_session(other)
    assert len(again.judgements.persons()) in (persons - 1, persons)
    assert again.figures()["random"]["answered"] == 0  # drawn anew for this model
    assert "do not belong to this run" in caplog.text


def test_only_what_was_shown_can_be_answered(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession]
) -> None:
    session = open_session(make_source())
    key = session.question("sure")["question"]["key"]
    session.answer(key, "same", [], [], "sure")
    with pytest.raises(StaleQuestion):
        session.answer(key, "same", [], [], "sure")


def test_the_list_is_a_data_set(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession], tmp_path: Path
) -> None:
    source = make_source(persons=20)
    for labels in (tmp_path / "review" / "labels.csv", tmp_path / "images" / "labels.csv"):
        session = open_session(source, labels)
        if not session.journal.answers:
            answer_all(session, "clusters")
        outside = labels.parent.name == "review"
        assert session.labels.needs_outside(source.records) is outside
        written = session.write()
        assert "20 persons" in written["summary"]
        assert written["commands"][0][0].startswith("Score")
        assert ("ALLOW_OUTSIDE: true" in written["commands"][0][1]) is outside
        rows = list(csv.DictReader(labels.read_text().splitlines()))
        assert all(row["path"].startswith("/") is outside for row in rows)
        dataset = CSV(str(labels), allow_outside=outside)
        splits = {name: dataset.load(name) for name in ("train", "query", "gallery")}  # type: ignore[arg-type]
        persons = {name: {record.pid for record in found} for name, found in splits.items()}
        assert not persons["train"] & persons["gallery"]
        assert persons["query"] == persons["gallery"]
        assert len(persons["train"] | persons["gallery"]) == 20
        assert min(len(persons["train"]), len(persons["query"])) >= 4
        assert len(splits["query"]) == 3 * len(persons["query"])  # one of each camera
        assert dataset.cameras == ("cam0", "cam1", "cam2")
        figures = session.figures()["labelled"]
        assert figures["queries"] == len(splits["query"])
        session.journal.close()
        session.close = lambda: None  # type: ignore[method-assign]


def test_anothers_list_is_not_overwritten(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession], tmp_path: Path
) -> None:
    source, labels = make_source(), tmp_path / "labels.csv"
    labels.write_text("path,pid\n")
    with pytest.raises(OutputError, match="this review has not written it"):
        open_session(source, labels)
    labels.unlink()
    session = open_session(source, labels)
    answer_all(session, "clusters", 3)
    session.write()
    answer_all(session, "clusters", 3)
    session.write()
    labels.write_text(labels.read_text() + "mine.png,1,0,train\n")
    with pytest.raises(OutputError, match="changed since"):
        session.write()
    assert "mine.png" in labels.read_text()


def test_persons_stay_in_their_split_as_labels_grow() -> None:
    records = [ImageRecord(f"/data/own/cam/{i}.png", camid=i % 3) for i in range(400)]
    groups: list[tuple[int, ...]] = []
    rng = np.random.default_rng(0)
    before: dict[int, bool] = {}
    for person in range(80):
        groups.append(tuple(range(5 * person, 5 * person + 3)))
        chosen = rng.integers(0, person + 1, 2).tolist()
        groups += [(5 * other, 5 * other + 3 + int(rng.integers(2))) for other in chosen]
        judgements = Judgements.of(400, [Facts(same=(group,)) for group in groups])
        splits = split_labels(judgements, records, groups, 0.5)
        now = {image: image in set(splits.gallery) for image in (*splits.train, *splits.gallery)}
        assert all(now[image] == where for image, where in before.items())
        before = now
    assert 25 <= splits.test_persons + splits.distractors <= 55
    for share, train in ((0.0, 80), (1.0, 0)):
        assert split_labels(judgements, records, groups, share).train_persons == train


def test_cameras_of_a_list() -> None:
    def texts(*cameras: tuple[int, str, str]) -> list[str]:
        return camera_texts([
            ImageRecord("x", camid=camid, source=source, extra={"camera": name} if name else {})
            for camid, name, source in cameras
        ])  # fmt: skip

    assert texts((0, "door", ""), (1, "hall", ""), (-1, "", "")) == ["door", "hall", ""]
    assert texts((0, "", ""), (7, "", "")) == ["0", "7"]
    assert texts((0, "1", ""), (1, "2", "")) == ["0", "1"]  # names that are numbers
    assert texts((0, "door", "a"), (1, "door", "b")) == ["a door", "b door"]


def test_one_camera_makes_distractors_and_unknown_ones_a_query() -> None:
    records = [ImageRecord(f"{i}", camid=0 if i < 2 else -1) for i in range(5)]
    groups = [(0, 1), (2, 3, 4)]
    judgements = Judgements.of(5, [Facts(same=(group,)) for group in groups])
    splits = split_labels(judgements, records, groups, 1.0)
    assert (splits.distractors, splits.test_persons) == (1, 1)
    assert len(splits.query) == 1
    assert splits.query[0] >= 2
    assert sorted(splits.gallery) == [0, 1, 2, 3, 4]
