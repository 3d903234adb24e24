"""Drawn images with features made up for them: what a review asks about, without a network."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from torch.nn import functional as F

from reid.config import load_config
from reid.evaluation.evaluators import Market1501Evaluator
from reid.evaluation.matches import cluster_confidence
from reid.structures import FeatureSet, ImageRecord
from reid.workflows.review.server import build_app
from reid.workflows.review.session import ReviewSession
from reid.workflows.review.source import Source, cross_camera_neighbors, neighbor_likeness


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Source]:
    """`persons` persons, `each` images of each in each of `cameras` cameras.

    The i-th image shows person `i // (each * cameras)`; clusters are the persons, but for a share
    of images that is in a wrong one.
    """

    def make(
        persons: int = 12,
        cameras: int = 3,
        each: int = 2,
        *,
        noise: float = 0.35,
        wrong: float = 0.0,
        fingerprint: str = "model",
        named: bool = True,
    ) -> Source:
        rng = np.random.default_rng(0)
        records = []
        folder = tmp_path / "images"
        for person in range(persons):
            for camera in range(cameras):
                for shot in range(each):
                    path = folder / f"cam{camera}" / f"{person:03d}_{shot}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    colour = ((37 * person) % 256, 80 * camera % 256, 60 * shot % 256)
                    Image.new("RGB", (8, 16), colour).save(path)
                    extra = {"camera": f"cam{camera}"} if named else {}
                    records.append(ImageRecord(str(path), camid=camera, extra=extra))
        truth = np.repeat(np.arange(persons), cameras * each)
        centres = rng.normal(size=(persons, 16))
        spread = rng.normal(size=(len(records), 16))
        test = F.normalize(torch.from_numpy(centres[truth] + noise * spread).float(), dim=1)
        cluster = truth.copy()
        moved = rng.random(len(cluster)) < wrong
        cluster[moved] = (cluster[moved] + 1) % persons
        camids = torch.tensor([record.camid for record in records])
        features = FeatureSet.of(test, camids=camids)
        neighbors = cross_camera_neighbors(features, [record.path for record in records], 10)
        return Source(
            "drawn",
            tmp_path / "run",
            load_config(None, ["MODEL.WEIGHTS", str(tmp_path / "run" / "model.safetensors")]),
            records,
            features,
            cluster,
            cluster_confidence(test, torch.from_numpy(cluster)).numpy(),
            "a test",
            neighbors,
            neighbor_likeness(test, neighbors),
            Market1501Evaluator(),
            fingerprint,
        )

    return make


class Served(NamedTuple):
    """A page that is being served.

    Attributes:
        session: Of the page.
        port: It listens at.
        token: In its link.
    """

    session: ReviewSession
    port: int
    token: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.token}/"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Sends a request as the page does, with other headers where they are given."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        given = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        given |= headers or {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {name: value for name, value in given.items() if value}
        connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
        response = connection.getresponse()
        found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return found

    def call(self, path: str, body: Any = None) -> Any:
        """The JSON behind a path below the token."""
        status, _, content = self.ask(f"/{self.token}/{path}", body)
        assert status == 200, content
        return json.loads(content)


@pytest.fixture
def open_session(tmp_path: Path) -> Iterator[Callable[..., ReviewSession]]:
    """Opens a session in the folder `review`; all are closed at the end."""
    opened: list[ReviewSession] = []

    def start(source: Source, labels: Path | None = None, share: float = 0.5) -> ReviewSession:
        folder = tmp_path / "review"
        folder.mkdir(exist_ok=True)
        session = ReviewSession(source, folder, labels or folder / "labels.csv", share)
        opened.append(session)
        return session

    yield start
    for session in opened:
        session.close()


@pytest.fixture
def served(
    make_source: Callable[..., Source], open_session: Callable[..., ReviewSession]
) -> Iterator[Served]:
    """A page of drawn images, served by a thread."""
    session = open_session(make_source(wrong=0.1))
    token = "T0ken-" + "x" * 20
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = build_app(session, token, frozenset([f"127.0.0.1:{port}", f"localhost:{port}"]))
    config = uvicorn.Config(
        cast(Any, app), log_level="warning", access_log=False, lifespan="off", ws="none",
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(session, port, token)
    server.should_exit = True
    thread.join()
    listening.close()
