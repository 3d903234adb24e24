#!/usr/bin/env python
"""How long a review of many images takes: start, questions, answers, thumbnails, figures, list.

Floors: of the near images, the product of each pair once; of an answer, a request that the server
refuses at once and a line written to disk (fsync); of a thumbnail, such a request and decoding and
encoding the picture, or reading a file; of the figures, the product of queries and gallery.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floors import Floor, Parts, all_compared, all_pairs, clock, same_threads
from PIL import Image
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
OVER: dict[str, float] = {}  # title -> how many times its floor it took


def main() -> int:
    """Measures and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--persons", type=int, default=8_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--answers", type=int, default=400)
    arguments = parser.parse_args()
    same_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth, records = _images(folder, arguments.images, arguments.persons)
        source = _source(folder, truth, records, arguments.dim)
        (folder / "review").mkdir()
        start = time.perf_counter()
        session = ReviewSession(source, folder / "review", folder / "labels.csv", 0.5)
        _show("start with features, clusters and neighbours kept", time.perf_counter() - start)
        with _served(session) as url:
            paths = [record.path for record in records]
            _measure(url, truth, arguments.answers, arguments.dim, paths)
        answers = len(session.journal.answers)
        session.close()
        start = time.perf_counter()
        ReviewSession(source, folder / "review", folder / "labels.csv", 0.5).close()
        _show(f"start again with {answers:,} answers", time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'memory, the most':<56}{peak:8.1f} GB")
    print(json.dumps({"stage": "review", "images": arguments.images, "over_floor": OVER}))
    return 0


def _measure(url: str, truth: np.ndarray, answers: int, dim: int, paths: list[str]) -> None:
    for view in ("clusters", "sure", "doubtful", "random", "persons", "auto"):
        times: list[float] = []
        floors: list[float] = []
        pictures: list[int] = []
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
            floors.append(_timed(lambda: _refused(url)) + _timed(_write_line))
        _show_many(f"{view}: answer on disk, next question", times, floors)
        if view == "clusters":
            shown = [*dict.fromkeys(pictures)]
            _measure_thumbnails(url, "thumbnail, made", shown, lambda n: _code_again(paths[n]))
            _measure_thumbnails(url, "thumbnail, kept", shown, lambda n: _read(paths[n]))
    start, since = time.perf_counter(), clock()
    figures = _call(url, "api/figures")
    seconds, taken = time.perf_counter() - start, clock() - since
    labelled = figures["labelled"]
    title = f"figures: {labelled['queries']:,} queries, {labelled['gallery']:,} gallery images"
    _show(title, seconds, taken, all_compared(labelled["queries"], labelled["gallery"], dim))
    _show("undo", _timed(lambda: _call(url, "api/undo", {})))
    _show("the list", _timed(lambda: _call(url, "api/write", {})))


def _measure_thumbnails(
    url: str, title: str, numbers: list[int], least: Callable[[int], object]
) -> None:
    times, floors = [], []
    for number in numbers:
        times.append(_timed(lambda n=number: _get(url, f"image/{n}")))
        floors.append(_timed(lambda: _refused(url)) + _timed(lambda n=number: least(n)))
    _show_many(title, times, floors)


def _refused(url: str) -> None:
    """A request to which the server has no answer."""
    with contextlib.suppress(urllib.error.HTTPError):
        _get(url, "nothing")


def _write_line() -> None:
    """Writes an answer's bytes where temporary files are, and waits for the disk."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(200))
        file.flush()
        os.fsync(file.fileno())


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _code_again(path: str) -> None:
    """Decodes and encodes a picture."""
    with Image.open(path) as picture:
        picture.save(io.BytesIO(), format="JPEG", quality=88)


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
    start, since = time.perf_counter(), clock()
    neighbors = cross_camera_neighbors(features, [record.path for record in records], 10)
    likeness = neighbor_likeness(test, neighbors)
    seconds, taken = time.perf_counter() - start, clock() - since
    _show("near images of other cameras, once", seconds, taken, all_pairs(len(test), dim))
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


def _show(title: str, seconds: float, taken: float = 0.0, least: Parts | None = None) -> None:
    """Prints a time, and with `least` how many times this floor `taken` is."""
    print(f"{title:<56}{seconds:8.2f} s{_over(title, taken, least)}", flush=True)


def _over(title: str, taken: float, least: Parts | None) -> str:
    if not least:
        return ""
    floor = Floor(least, taken)
    OVER[title.split(":")[0]] = floor.facts()["over_floor"]
    return f", over_floor {floor.over:.1f}"


def _show_many(title: str, times: list[float], floors: list[float]) -> None:
    if not times:
        print(f"{title:<56}    none", flush=True)
        return
    times = [1000 * value for value in sorted(times)]
    median, late = statistics.median(times), times[int(0.95 * (len(times) - 1))]
    told = f"{median:8.0f} ms (95 %: {late:.0f}, the most: {times[-1]:.0f}, of {len(times)})"
    over = _over(title, median / 1000, {"least": statistics.median(floors)})
    print(f"{title:<56}{told}{over}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
