"""What answers together say, where they agree and where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from reid.workflows.review.judgements import NOBODY, Facts, Judgements
from reid.workflows.review.question import AnswerError, Question


def test_persons_join_and_stay_apart() -> None:
    known = Judgements(8)
    assert known.add(Facts(same=((0, 1), (2, 3)), different=((1, 2),)))
    assert known.relation(0, 1) is True
    assert known.relation(0, 3) is False
    assert known.relation(0, 4) is None
    assert known.add(Facts(same=((3, 4, 5),), junk=(7,)))
    assert known.relation(5, 1) is False
    assert sorted(len(known.members(person)) for person in known.persons()) == [2, 4]
    assert known.person[6] == known.person[7] == NOBODY
    assert known.junk.nonzero()[0].tolist() == [7]


@pytest.mark.parametrize(
    ("old", "new", "relation"),
    [
        (Facts(same=((0, 1),)), Facts(different=((0, 1),)), False),
        (Facts(different=((0, 1),)), Facts(same=((0, 1),)), True),
        (Facts(junk=(0,)), Facts(same=((0, 1),)), True),
        (Facts(same=((0, 1),)), Facts(junk=(0,)), None),
        (Facts(same=((0, 2, 1),)), Facts(different=((0, 1),)), False),
    ],
)
def test_the_newer_answer_counts(old: Facts, new: Facts, relation: bool | None) -> None:
    known = Judgements(4)
    known.add(old)
    assert not known.add(new)
    known = Judgements.of(4, [old, new])
    assert known.relation(0, 1) is relation
    assert known.contradictions == 1


def test_any_order_gives_the_same_without_contradictions() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 9, 60)
    facts = []
    for _ in range(200):
        one, other = rng.integers(0, 60, 2).tolist()
        if truth[one] == truth[other]:
            facts.append(Facts(same=((one, other),)))
        else:
            facts.append(Facts(different=((one, other),)))
    newest_first = Judgements.of(60, facts)
    in_order = Judgements(60)
    assert all(in_order.add(each) for each in facts)
    table = [[known.relation(i, j) for i in range(60) for j in range(60)]
             for known in (newest_first, in_order)]  # fmt: skip
    assert table[0] == table[1]
    assert newest_first.contradictions == 0
    # what follows from the facts, found by spreading them until nothing changes
    group = list(range(60))
    for _ in range(60):
        for one, other in (pair for each in facts for pair in each.same):
            group[one] = group[other] = min(group[one], group[other])
    apart = {(group[a], group[b]) for each in facts for a, b in each.different}
    for i in range(60):
        for j in range(60):
            if newest_first.relation(i, j) is True:
                assert group[i] == group[j]
            elif newest_first.relation(i, j) is False:
                assert (group[i], group[j]) in apart or (group[j], group[i]) in apart


SHEET = Question("cluster", (3, 4, 5, 6), (1, 2), ((10, 11), (12,)))
FRESH = Question("cluster", (3, 4, 5, 6))
PAIR = Question("pair", (3, 4))
PERSONS = Question("persons", (3, 4), (1, 2))
SAMPLE = Question("random", (3, 4, 5), (0,))


@pytest.mark.parametrize(
    ("question", "verdict", "marked", "chosen", "facts"),
    [
        (SHEET, "same", [5], [], Facts(((1, 2, 3, 4, 6),), ((1, 5),))),
        (FRESH, "same", [3], [], Facts(((4, 5, 6),), ((4, 3),))),
        (SHEET, "split", [5, 6], [], Facts(((1, 2, 3, 4), (5, 6)), ((1, 5),))),
        (SHEET, "merge", [4], [0, 1], Facts(((1, 2, 3, 5, 6, 10, 11, 12),), ((1, 4),))),
        (SHEET, "different", [], [], Facts()),
        (SHEET, "junk", [6, 3], [], Facts(junk=(3, 6))),
        (SHEET, "junk", [], [], Facts(junk=(3, 4, 5, 6))),
        (SHEET, "next", [3], [1], Facts()),
        (PAIR, "same", [], [], Facts(((3, 4),))),
        (PAIR, "different", [], [], Facts(different=((3, 4),))),
        (PAIR, "junk", [], [], Facts(junk=(3, 4))),
        (PAIR, "junk", [4], [], Facts(junk=(4,))),
        (PERSONS, "same", [], [], Facts(((1, 3),))),
        (PERSONS, "different", [], [], Facts(different=((1, 3),))),
        (PERSONS, "junk", [4], [], Facts(junk=(4,))),
        (SAMPLE, "same", [4], [], Facts(((0, 4),), ((0, 3), (0, 5)))),
        (SAMPLE, "different", [], [], Facts(different=((0, 3), (0, 4), (0, 5)))),
        (SAMPLE, "junk", [], [], Facts(junk=(0,))),
        (SAMPLE, "junk", [5], [], Facts(junk=(5,))),
    ],
)
def test_what_answers_say(
    question: Question, verdict: str, marked: list[int], chosen: list[int], facts: Facts
) -> None:
    assert question.facts(verdict, marked, chosen) == facts


@pytest.mark.parametrize(
    ("question", "verdict", "marked", "chosen"),
    [
        (SHEET, "same", [99], []), (SHEET, "same", [1], []), (SHEET, "same", [3, 3], []),
        (SHEET, "merge", [], [2]), (SHEET, "merge", [], [-1]), (SHEET, "merge", [], []),
        (SHEET, "same", [], [0]), (SHEET, "split", [], []), (SHEET, "different", [3], []),
        (SHEET, "nonsense", [], []), (FRESH, "same", [3, 4, 5, 6], []),
        (FRESH, "same", [3, 4, 5], []), (FRESH, "split", [3, 4, 5, 6], []),
        (PAIR, "same", [3], []), (PAIR, "merge", [], []), (PERSONS, "junk", [], []),
        (SAMPLE, "same", [], []), (SAMPLE, "different", [3], []), (SAMPLE, "split", [3], []),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(
    question: Question, verdict: str, marked: list[int], chosen: list[int]
) -> None:
    with pytest.raises(AnswerError):
        question.facts(verdict, marked, chosen)
