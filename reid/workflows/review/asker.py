"""Chooses the next question: clusters, pairs, persons that look alike, random samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from reid.neighbors import nearest_neighbors
from reid.structures import OUTLIER, UNKNOWN_CAMERA
from reid.workflows.review.judgements import NOBODY, Judgements
from reid.workflows.review.question import Question
from reid.workflows.review.similarity import SameProbability
from reid.workflows.review.source import Source
from reid.workflows.review.views import View

SHEET = 40
"""Images of a cluster in one question."""
FIRST_PLACES = 20
"""Number of images that are compared with a randomly sampled one."""
_ANCHORS, _OTHERS, _OF_OTHER, _SIDE = 3, 4, 3, 6
_NEAR_PERSONS = 8
_UNLIKELY = 0.05
_MOST_OF_PRIOR = 1_000
_TRIED = 2_000
_TURNS: tuple[View, ...] = ("clusters", "random", "doubtful", "persons")

Ints = npt.NDArray[np.int64]


class Asker:
    """Finds questions that are not answered yet.

    Args:
        source: The images.
        judgements: What is known about them; read again for each question.

    Attributes:
        pairs: (P, 2) near pairs of different cameras, the lower number first.
        similarity: (P,) cosine of each.
    """

    def __init__(self, source: Source, judgements: Judgements) -> None:
        self._source = source
        self.judgements = judgements
        self._features = source.features.test
        self._present = source.features.present.numpy()
        count = len(source.records)
        self._on_sheet = np.zeros(count, np.bool_)
        self._sampled = np.zeros(count, np.bool_)
        self._in_pair: set[tuple[int, int]] = set()
        self._paired = np.zeros(count, np.bool_)
        self._judged: list[tuple[float, bool]] = []
        self._members, self._cluster_order = _clusters(source)
        self._means = self._cluster_means()
        self.pairs, self.similarity, mutual = _near_pairs(source)
        order = np.argsort(-self.similarity, kind="stable")
        self._surest = order[mutual[order]]
        self._rising = order[::-1]
        self._rising_similarity = self.similarity[self._rising]
        self._prior = self._prior_pairs()
        self._probability: tuple[int, SameProbability] | None = None
        self._near: tuple[int, list[tuple[float, int, int]]] | None = None
        self._random = np.random.default_rng(0).permutation(count)
        self._random = self._random[self._present[self._random]]

    def note(self, kind: str, shown: Sequence[int], asked: Sequence[int], verdict: str) -> None:
        """Notes that a question was answered; `judgements` are kept by the caller.

        Args:
            kind: Of the question.
            shown: Its images; see `Question.shown`.
            asked: See `Question.asked`.
            verdict: Of the answer.
        """
        if kind == "cluster":
            self._on_sheet[list(asked)] = True
        elif kind == "random":
            self._sampled[shown[0]] = len(asked) == len(shown) - 1
        else:
            one, other = shown[0], shown[1] if kind == "pair" else asked[0]
            self._in_pair.add((min(one, other), max(one, other)))
            if kind == "pair":
                self._paired[[one, other]] = True
                if verdict in ("same", "different"):
                    cosine = float(self._features[one] @ self._features[other])
                    self._judged.append((cosine, verdict == "same"))

    def forget(self, judgements: Judgements) -> None:
        """Starts with no answers noted, and with other judgements."""
        self.judgements = judgements
        for flags in (self._on_sheet, self._sampled, self._paired):
            flags[:] = False
        self._in_pair.clear()
        self._judged.clear()
        self._probability = self._near = None

    def next(self, view: View, answered: int) -> Question | None:
        """The next question of a view; None: nothing is left to ask.

        Args:
            view: What is asked; `auto` takes turns.
            answered: Answers so far.
        """
        if view != "auto":
            return self._ask(view)
        for turn in range(len(_TURNS)):
            question = self._ask(_TURNS[(answered + turn) % len(_TURNS)])
            if question is not None:
                return question
        return self._ask("sure")

    def unjudged_persons(self) -> list[tuple[float, int, int]]:
        """Labelled persons that look alike and may be one: (probability, person, person).

        The likeliest first. Two persons count where one is among the eight nearest of the other,
        by the means of their features, and the probability is 5 % or more.
        """
        persons = self.judgements.persons()
        if len(persons) < 2:
            return []
        judgements, made = self.judgements, self._near
        patience = len(persons) // 50  # searching after every answer would be slow
        if made is None or judgements.changes - made[0] > patience:
            made = self._near = judgements.changes, self._near_persons(persons)
        alive = set(persons)
        return [
            (p, one, other)
            for p, one, other in made[1]
            if one in alive and other in alive and not judgements.are_apart(one, other)
        ]

    def _ask(self, view: View) -> Question | None:
        finders = {
            "clusters": self._next_cluster, "sure": self._next_sure,
            "doubtful": self._next_doubtful, "random": self._next_random,
            "persons": self._next_persons,
        }  # fmt: skip
        assert set(finders) | {"auto"} == set(get_args(View))
        return finders[view]()

    def _next_cluster(self) -> Question | None:
        judgements = self.judgements
        for cluster in self._cluster_order:
            members = self._members[cluster]
            left = members[~self._on_sheet[members] & ~judgements.junk[members]]
            if not len(left):
                continue
            persons = judgements.person[members]
            known = persons[persons != NOBODY]
            anchor: tuple[int, ...] = ()
            if len(known):
                person = int(np.bincount(known).argmax())
                if len(judgements.members(person)) > 1:
                    same = members[persons == person]
                    anchor = tuple(same[:_ANCHORS].tolist())
                    settled = [judgements.relation(anchor[0], image) for image in left.tolist()]
                    left = left[[relation is None for relation in settled]]
            if len(left) + len(anchor) < 2 or not len(left):
                continue
            images = tuple(left[:SHEET].tolist())
            others = tuple(self._nearest_clusters(cluster))
            about = {
                "cluster": cluster,
                "size": len(members),
                "left": len(left) - len(images),
                "confidence": round(float(self._source.confidence[members].mean()), 2),
            }
            return Question("cluster", images, anchor, others, about)
        return None

    def _next_sure(self) -> Question | None:
        return next(self._open_pairs(self._surest, fresh=False), None)

    def _next_doubtful(self) -> Question | None:
        """The most doubtful pair, first among images that no pair has shown yet."""
        even = self.probability().even
        for fresh in (True, False):
            for places in self._around(even):
                question = next(self._open_pairs(places, fresh), None)
                if question is not None:
                    return question
        return None

    def _around(self, similarity: float) -> Iterator[Ints]:
        """Places of pairs around a similarity, the nearest first; more of them each time."""
        middle = int(np.searchsorted(self._rising_similarity, similarity))
        total, reach = len(self._rising), _TRIED
        while True:
            some = slice(max(0, middle - reach), middle + reach)
            distance = np.abs(self._rising_similarity[some] - similarity)
            yield self._rising[some][np.argsort(distance, kind="stable")]
            if reach >= total:
                return
            reach *= 8

    def probability(self) -> SameProbability:
        """How likely two images show the same person, by the answers so far."""
        version = len(self._judged)
        if self._probability is None or self._probability[0] != version:
            judged = [value for value, _ in self._judged]
            same = [answer for _, answer in self._judged]
            self._probability = version, SameProbability(*self._prior, judged, same)
        return self._probability[1]

    def _open_pairs(self, places: Ints, fresh: bool) -> Iterator[Question]:
        """Questions about the pairs at these places whose answer is not known."""
        judgements = self.judgements
        for start in range(0, len(places), _TRIED):
            some = places[start : start + _TRIED]
            rows = self.pairs[some]
            person = judgements.person[rows]
            known = (person[:, 0] == person[:, 1]) & (person[:, 0] != NOBODY)
            usable = some[~judgements.junk[rows].any(1) & ~known]
            for place in usable.tolist():
                one, other = (int(image) for image in self.pairs[place])
                if (one, other) in self._in_pair or judgements.relation(one, other) is not None:
                    continue
                if fresh and (self._paired[one] or self._paired[other]):
                    continue
                value = float(self.similarity[place])
                p = float(self.probability()(np.array([value]))[0])
                about = {"similarity": round(value, 3), "probability": round(p, 2)}
                yield Question("pair", (one, other), about=about)

    def _next_random(self) -> Question | None:
        for query in self._random.tolist():
            if not self._sampled[query] and not self.judgements.junk[query]:
                images = self._first_places(query)
                if images:
                    about = {"sampled": int(self._sampled.sum()), "of": len(self._random)}
                    return Question("random", images, (query,), about=about)
        return None

    def _first_places(self, query: int) -> tuple[int, ...]:
        camids = self._source.features.camids
        similarity = self._features @ self._features[query]
        out = torch.from_numpy(~self._present | self.judgements.junk)
        if int(camids[query]) != UNKNOWN_CAMERA:
            out = out | (camids == camids[query])
        out[query] = True
        similarity[out] = -torch.inf
        values, places = similarity.topk(min(FIRST_PLACES, len(similarity)))
        return tuple(places[values > -torch.inf].tolist())

    def _next_persons(self) -> Question | None:
        for p, one, other in self.unjudged_persons():
            sides = [tuple(self._some_of(person)) for person in (one, other)]
            if (min(sides[0][0], sides[1][0]), max(sides[0][0], sides[1][0])) in self._in_pair:
                continue
            about = {"probability": round(p, 2)}
            return Question("persons", sides[1], sides[0], about=about)
        return None

    def _some_of(self, person: int) -> list[int]:
        """Images of a person from as many cameras as there are, at most `_SIDE`."""
        images = sorted(self.judgements.members(person))
        camids = self._source.features.camids[images].tolist()
        seen: dict[int, int] = {}
        turns = []
        for image, camid in zip(images, camids, strict=True):
            turns.append((seen.get(camid, 0), image))
            seen[camid] = seen.get(camid, 0) + 1
        return [image for _, image in sorted(turns)[:_SIDE]]

    def _near_persons(self, persons: Sequence[int]) -> list[tuple[float, int, int]]:
        # by an image, since their numbers depend on the order of the answers
        persons = sorted(persons, key=lambda person: min(self.judgements.members(person)))
        means = torch.stack(
            [self._features[self.judgements.members(person)].mean(0) for person in persons]
        )
        unit = F.normalize(means, dim=1)
        near = nearest_neighbors(unit, min(_NEAR_PERSONS + 1, len(persons))).astype(np.int64)
        rows = np.repeat(np.arange(len(persons)), near.shape[1])
        pairs = np.stack((rows, near.ravel()), 1)
        pairs = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)
        cosine = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1).numpy()
        likely = self.probability()(cosine.astype(np.float64))
        order = np.argsort(-likely, kind="stable")
        return [
            (float(likely[i]), persons[pairs[i, 0]], persons[pairs[i, 1]])
            for i in order[likely[order] >= _UNLIKELY].tolist()
        ]

    def _cluster_means(self) -> torch.Tensor:
        if not self._members:
            return torch.zeros(0, self._features.shape[1])
        means = [self._features[torch.from_numpy(rows)].mean(0) for rows in self._members.values()]
        return F.normalize(torch.stack(means), dim=1)

    def _nearest_clusters(self, cluster: int) -> Iterator[tuple[int, ...]]:
        """Sure images of the nearest other clusters, of those that no answer has settled."""
        names = list(self._members)
        similarity = self._means @ self._means[names.index(cluster)]
        order = torch.argsort(similarity, descending=True)[: 4 * _OTHERS + 1].tolist()
        first = int(self._members[cluster][0])
        given = 0
        for place in order:
            rows = self._members[names[place]]
            rows = rows[~self.judgements.junk[rows]][:_OF_OTHER]
            if names[place] == cluster or not len(rows) or given == _OTHERS:
                continue
            if self.judgements.relation(first, int(rows[0])) is None:
                given += 1
                yield tuple(rows.tolist())

    def _prior_pairs(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Similarities of near pairs inside clusters, and of near pairs of two clusters."""
        cluster = self._source.cluster[self.pairs]
        inside = (cluster[:, 0] == cluster[:, 1]) & (cluster[:, 0] != OUTLIER)
        between = (cluster[:, 0] != cluster[:, 1]) & (cluster != OUTLIER).all(1)
        values = self.similarity.astype(np.float64)
        return _spread(values[inside]), _spread(values[between])


def _spread(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values[:: max(1, len(values) // _MOST_OF_PRIOR)]


def _clusters(source: Source) -> tuple[dict[int, Ints], list[int]]:
    """Members of each cluster, surest first; and the clusters in the order of the questions.

    Clusters of several cameras first, the surest of each kind before the others.
    """
    order = np.argsort(-source.confidence, kind="stable")
    order = order[source.cluster[order] != OUTLIER]
    order = order[np.argsort(source.cluster[order], kind="stable")]
    names, starts = np.unique(source.cluster[order], return_index=True)
    members = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=bool(len(names))))
    camids = source.features.camids.numpy()

    def rank_of(cluster: int) -> tuple[bool, float, int]:
        rows = members[cluster]
        one_camera = len(np.unique(camids[rows])) < 2
        return one_camera, -float(source.confidence[rows].mean()), cluster

    return members, sorted(members, key=rank_of)


def _near_pairs(source: Source) -> tuple[Ints, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Pairs (P, 2) of images and neighbours, their similarities, and which are mutual firsts."""
    neighbors = source.neighbors
    count, k = neighbors.shape
    rows = np.repeat(np.arange(count), k)
    pairs = np.stack((rows, neighbors.ravel()), 1)
    there = pairs[:, 1] >= 0
    pairs = np.sort(pairs[there], axis=1)
    # one number for a pair: far faster than unique rows
    keys, places = np.unique(pairs[:, 0] * count + pairs[:, 1], return_index=True)
    pairs = np.stack(np.divmod(keys, max(count, 1)), 1)
    similarity = source.likeness.ravel()[there][places]
    first = neighbors[:, 0] if k else np.full(count, -1)
    mutual = (first[pairs[:, 0]] == pairs[:, 1]) & (first[pairs[:, 1]] == pairs[:, 0])
    return pairs, similarity, mutual
