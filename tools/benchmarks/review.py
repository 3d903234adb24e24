#!/usr/bin/env python
"""How long a review of many images takes: start, questions, answers, thumbnails, figures, list."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from reid.config import load_config
from reid.data.synthetic import PersonSet, draw_persons
from reid.evaluation.evaluators import Market1501Evaluator
from reid.evaluation.matches import cluster_confidence
from reid.structures import FeatureSet, ImageRecord
from reid.workflows.review.server import build_app
from reid.workflows.review.session import ReviewSession
from reid.workflows.review.source import Source, cross_camera_neighbors, neighbor_likeness

TOKEN = "token"


def main() -> int:
    """Measures and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--persons", type=int, default=8_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--answers", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth, records = _images(folder, arguments.images, arguments.persons)
        source = _source(folder, truth, records, arguments.dim)
        (folder / "review").mkdir()
        start = time.perf_counter()
        session = ReviewSession(source, folder / "review", folder / "labels.csv", 0.5)
        _show("start with features, clusters and neighbours kept", time.perf_counter() - start)
        with _served(session) as url:
            _measure(url, truth, arguments.answers)
        answers = len(session.journal.answers)
        session.close()
        start = time.perf_counter()
        ReviewSession(source, folder / "review", folder / "labels.csv", 0.5).close()
        _show(f"start again with {answers:,} answers", time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'memory, the most':<56}{peak:8.1f} GB")
    return 0


def _measure(url: str, truth: np.ndarray, answers: int) -> None:
    for view in ("clusters", "sure", "doubtful", "random", "persons", "auto"):
        times, pictures = [], []
        page = _call(url, f"api/question?view={view}")
        for _ in range(answers):
            question = page["question"]
            if question is None:
                break
            shown = [each["number"] for each in (*question["anchor"], *question["images"])]
            if len(pictures) < 2000:
                pictures += shown
            body = {"key": question["key"], "view": view, **_verdict(question, truth)}
            start = time.perf_counter()
            page = _call(url, "api/answer", body)
            times.append(time.perf_counter() - start)
        _show_many(f"{view}: answer on disk, next question", times)
        if view == "clusters":
            for title in ("thumbnail, made", "thumbnail, kept"):
                _show_many(title, [_timed(lambda n=n: _get(url, f"image/{n}")) for n in
                                   dict.fromkeys(pictures)])  # fmt: skip
    start = time.perf_counter()
    figures = _call(url, "api/figures")
    labelled = figures["labelled"]
    title = f"figures: {labelled['queries']:,} queries, {labelled['gallery']:,} gallery images"
    _show(title, time.perf_counter() - start)
    _show("undo", _timed(lambda: _call(url, "api/undo", {})))
    _show("the list", _timed(lambda: _call(url, "api/write", {})))


def _verdict(question: dict[str, Any], truth: np.ndarray) -> dict[str, Any]:
    """What a person without a fault says."""
    images = [each["number"] for each in question["images"]]
    anchor = [each["number"] for each in question["anchor"]]
    if question["kind"] == "pair":
        same = truth[images[0]] == truth[images[1]]
        return {"verdict": "same" if same else "different"}
    if question["kind"] == "persons":
        return {"verdict": "same" if truth[images[0]] == truth[anchor[0]] else "different"}
    if question["kind"] == "random":
        marked = [i for i in images if truth[i] == truth[anchor[0]]]
        return {"verdict": "same" if marked else "different", "marked": marked}
    who = truth[anchor[0]] if anchor else np.bincount(truth[images]).argmax()
    marked = [i for i in images if truth[i] != who]
    if len(images) - len(marked) + len(anchor) < 2:
        return {"verdict": "different"}
    return {"verdict": "same", "marked": marked}


def _images(folder: Path, count: int, persons: int) -> tuple[np.ndarray, list[ImageRecord]]:
    """Links to a few hundred drawn pictures, a name for each image; images of a person together."""
    drawn = folder / "drawn"
    draw_persons(drawn, PersonSet(0, 40, 1, 6, 3, 0))
    pictures = sorted(drawn.rglob("*.jpg"))
    truth = np.sort(np.random.default_rng(0).integers(0, persons, count))
    records = []
    for number in range(count):
        camera = number % 8
        path = folder / "images" / f"camera{camera}" / f"{number // 1000}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(pictures[number % len(pictures)], path)
        record = ImageRecord(str(path), camid=camera, extra={"camera": f"camera{camera}"})
        records.append(record)
    return np.unique(truth, return_inverse=True)[1], records


def _source(folder: Path, truth: np.ndarray, records: list[ImageRecord], dim: int) -> Source:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(truth.max() + 1, dim)).astype(np.float32)
    noise = rng.normal(size=(len(truth), dim)).astype(np.float32)
    test = F.normalize(torch.from_numpy(centres[truth] + 0.9 * noise), dim=1)
    cluster = truth.astype(np.int64)
    cluster[rng.random(len(cluster)) < 0.1] = -1
    features = FeatureSet.of(test, camids=torch.tensor([record.camid for record in records]))
    start = time.perf_counter()
    neighbors = cross_camera_neighbors(features, [record.path for record in records], 10)
    likeness = neighbor_likeness(test, neighbors)
    _show("near images of other cameras, once", time.perf_counter() - start)
    return Source(
        "benchmark", folder / "run", load_config(None), records, features, cluster,
        cluster_confidence(test, torch.from_numpy(cluster)).numpy(), "a benchmark",
        neighbors, likeness,
        Market1501Evaluator(), "model",
    )  # fmt: skip


@contextmanager
def _served(session: ReviewSession) -> Iterator[str]:
    import uvicorn

    app = build_app(session, TOKEN, frozenset(["127.0.0.1:8797"]))
    config = uvicorn.Config(app, port=8797, log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:8797/{TOKEN}/"
    server.should_exit = True
    thread.join()


def _call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    return json.loads(_get(url, path, body))


def _get(url: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    headers = {"Content-Type": "application/json", "Origin": url.rsplit("/", 2)[0]}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers)
    with urllib.request.urlopen(request) as response:
        content: bytes = response.read()
    return content


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _show(title: str, seconds: float) -> None:
    print(f"{title:<56}{seconds:8.2f} s", flush=True)


def _show_many(title: str, times: list[float]) -> None:
    if not times:
        print(f"{title:<56}    none", flush=True)
        return
    times = [1000 * value for value in sorted(times)]
    median, late = statistics.median(times), times[int(0.95 * (len(times) - 1))]
    told = f"{median:8.0f} ms (95 %: {late:.0f}, the most: {times[-1]:.0f}, of {len(times)})"
    print(f"{title:<56}{told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
