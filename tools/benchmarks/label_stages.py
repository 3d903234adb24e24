#!/usr/bin/env python
"""Measures the label stage of each method: from features to labels and all that losses need.

Each method runs as in training: with its published MSMT17 config, the parts that the assembly
builds, and the hook `RefreshPseudoLabels`. Only the features are synthetic. Beside each measurement
stand the largest arrays of the published way, by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from measure import Measured, measure
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from reid.assembly.criterion import build_criterion
from reid.assembly.data import hide_target_identities
from reid.assembly.network import build_model
from reid.assembly.plugins import register_parts
from reid.assembly.sampler import build_sampler
from reid.assembly.stages import build_labellers
from reid.config import Config, load_config
from reid.engine.hooks.refresh_labels import LabelledImages, RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.evaluation.extract import ImageSet
from reid.modeling.losses import Criterion
from reid.structures import Batch, FeatureSet, ImageRecord

IMAGES, SOURCE_IMAGES = 32_621, 12_936  # MSMT17's train and val lists; Market-1501's
CAMERAS, IMAGES_PER_PERSON = 15, 31
SMALL = 600
"""Images of the run that warms up: fewer than 600 are too few for IICS's and MGH's settings."""


class Arrays(NamedTuple):
    """Large arrays of a published program that exist at the same time.

    Attributes:
        what: What they hold.
        count: How many.
        size: Bytes of an entry.
        columns: C of an N x C array; 0: N x N.
    """

    what: str
    count: int
    size: int = 4
    columns: int = 0

    def gigabytes(self, images: int) -> float:
        """Of all of them, for N images."""
        return self.count * self.size * images * (self.columns or images) / 1e9


JACCARD = Arrays("V and Jaccard", 2)
"""Of the published code that most methods share, in single precision."""


class Case(NamedTuple):
    """The label stage of a method.

    Attributes:
        does: What it does.
        config: Its file, below `projects`.
        published: The largest arrays of the published way.
        stage: Number of the stage in the config.
        epoch: The first epoch that is measured.
        before: Epochs just before it, which run too but are not measured.
        epochs: How many are measured.
        state: State of the labeller, as from a checkpoint.
        source: It uses the images of a labelled source.
    """

    does: str
    config: str
    published: tuple[Arrays, ...] = ()
    stage: int = -1
    epoch: int = 0
    before: int = 0
    epochs: int = 1
    state: Mapping[str, Any] = {}
    source: bool = False


SIMILAR = (JACCARD, Arrays("label equality, min, max", 5))
"""Of the self-paced test of SpCL's code."""
CASES = {
    "ClusterContrast": Case(
        "Jaccard, DBSCAN, cluster memory", "ClusterContrast/configs/msmt.yaml", (JACCARD,)
    ),
    "CAP": Case("Jaccard, DBSCAN, proxy memory", "CAP/configs/msmt.yaml", (JACCARD,)),
    "O2CAP": Case("Jaccard, DBSCAN, proxy memory", "O2CAP/configs/msmt.yaml", (JACCARD,)),
    "TMGF": Case(
        "Jaccard, DBSCAN, proxy memory of 6 banks", "TMGF/configs/msmt.yaml", (JACCARD,)
    ),
    "SpCL": Case(
        "Jaccard of the memory's rows, 3 DBSCANs, self-paced test",
        "SpCL/configs/msmt.yaml", SIMILAR, epoch=1, before=1,
    ),
    "PPLR": Case(
        "Jaccard, DBSCAN, 4 classifiers, cross agreement of 3 parts, proxies",
        "PPLR/configs/msmt.yaml", (JACCARD,), epoch=5,
    ),
    "ICE": Case("Jaccard, DBSCAN, centres, proxies", "ICE/configs/msmt.yaml", (JACCARD,)),
    "RLCC": Case(
        "Jaccard, 3 DBSCANs, self-paced test, consensus with the last epoch",
        "RLCC/configs/msmt.yaml",
        (*SIMILAR, Arrays("refined labels", 1, columns=10_000)), epoch=1, before=1,
    ),
    "BUC": Case(
        "18 merges of 5 %, single linkage", "BUC/configs/msmt.yaml",
        (Arrays("distances", 1), Arrays("their order, int64", 3, 8)),
        stage=1, epoch=1, before=1, epochs=18,
    ),
    "HCT": Case(
        "13 merges of 7 %, average linkage", "HCT/configs/msmt.yaml",
        (Arrays("distances (no code)", 1),),
    ),
    "IICS stage 1": Case(
        "each camera: re-ranking, average linkage", "IICS/configs/msmt.yaml", stage=0
    ),
    "IICS stage 2": Case(
        "similarity of class scores, re-ranking, average linkage", "IICS/configs/msmt.yaml",
        (
            Arrays("distances, similarity, V, Jaccard", 4),
            Arrays("linkage", 1, 8),
            Arrays("class scores", 1, columns=9000),
        ), stage=1,
    ),
    "MGH": Case(
        "Jaccard, DBSCAN, time histograms, re-ranking, hypergraph, lists", "MGH/configs/msmt.yaml",
        (Arrays("distances", 4),), epoch=6, state={"epoch": 6},
    ),
    "MultiCentroid": Case(
        "Jaccard, DBSCAN, 4 centroids a cluster", "MultiCentroid/configs/msmt.yaml"
    ),
    "ClusterEnsemble": Case(
        "Jaccard, 3 DBSCANs, instance memory", "ClusterEnsemble/configs/msmt.yaml"
    ),
    "SSG": Case(
        "3 x (re-ranked Jaccard, source term, eps from rho, DBSCAN)", "SSG/configs/msmt.yaml",
        (
            Arrays("distances, V, Jaccard, half precision", 3, 2),
            Arrays("distances to the source", 1, 2, SOURCE_IMAGES),
        ), source=True,
    ),
    "MMT": Case(
        "k-means with 1,000 means and 10 starts, 4 classifiers",
        "MMT/configs/msmt_from_market.yaml",
    ),
    "SpCL with a source": Case(
        "as SpCL, source classes in the memory", "SpCL/configs/uda_to_msmt.yaml", SIMILAR,
        epoch=1, before=1, source=True,
    ),
}  # fmt: skip


class Shapes(NamedTuple):
    """The shapes of a network's features.

    Attributes:
        banks: 1 + K.
        dim: D of a bank.
        test: D' of the test feature; 0: it is the first bank.
    """

    banks: int
    dim: int
    test: int


class Layout(NamedTuple):
    """Who is on the images, each (N,); source images come first.

    Attributes:
        person: From 0.
        camid: From 0.
        frame: Of the camera's clock.
        domain: 0, or 0 for a source and 1 for the target.
    """

    person: Tensor
    camid: Tensor
    frame: Tensor
    domain: Tensor


@dataclass(frozen=True)
class ReadyImages(ImageSet):
    """Images whose features are ready.

    Attributes:
        ready: The features, the only item.
    """

    ready: list[FeatureSet] = field(default_factory=list)

    def features(self, *_: Any) -> FeatureSet:
        """The features that are ready."""
        return self.ready[0]


class Recorder(MetricWriter):
    """Keeps the numbers of the last labels, and writes nothing."""

    numbers: Mapping[str, float]

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Keeps the numbers."""
        self.numbers = numbers


@dataclass
class LabelStage:
    """A method's label stage with features for it.

    Attributes:
        hook: The stage itself.
        trainer: What the hook asks of a trainer.
        images: The hook takes features from it.
        writer: Gets the hook's numbers.
        epochs: The next ones.
    """

    hook: RefreshPseudoLabels
    trainer: Any
    images: ReadyImages
    writer: Recorder
    epochs: range

    def run(self) -> Mapping[str, float]:
        """Makes the labels of the epochs; gives the numbers of the last ones."""
        for epoch in self.epochs:
            self.trainer.epoch = epoch
            self.hook.before_epoch(self.trainer)
        return self.writer.numbers


def read_case(case: Case, images: int = IMAGES) -> Config:
    """The config of a method, with its parts registered, without files of weights.

    Of fewer images than MSMT17 has, k-means makes fewer clusters.
    """
    config = load_config(Path(__file__).parents[2] / "projects" / case.config)
    register_parts(config)
    clusterer = config.clusterer
    if clusterer and "num_clusters" in clusterer and images < IMAGES:
        number = clusterer["num_clusters"] * images // IMAGES
        clusterer = {**clusterer, "num_clusters": max(number, 2)}
    model = replace(config.model, backbone_weights="", weights="")
    return replace(config, model=model, clusterer=clusterer)


def find_shapes(case: Case) -> Shapes:
    """Builds the method's network and looks at its features of an empty image."""
    config = read_case(case).of_stage(case.stage)
    height, width = config.input.size
    model = build_model(config, (height, width), CAMERAS, training=False).eval()
    camid = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        embeddings = model(Batch.of(torch.zeros(1, 3, height, width), camid))
    test, unit = embeddings.test, embeddings.unit
    first = test.shape == unit[:, 0].shape and test.data_ptr() == unit.data_ptr()
    return Shapes(unit.shape[1], unit.shape[2], 0 if first else test.shape[1])


def make_layout(images: int, source: bool) -> Layout:
    """Persons with about 31 images, each seen by up to five cameras, at one time in each."""
    generator = torch.Generator().manual_seed(0)
    counts = [images * SOURCE_IMAGES // IMAGES, images] if source else [images]
    persons, camids, frames, domains = [], [], [], []
    first_person = first_camera = 0
    for domain, count in enumerate(counts):
        cameras = 6 if domain < len(counts) - 1 else CAMERAS  # Market-1501 has six
        number = max(count // IMAGES_PER_PERSON, 4)
        person = torch.randint(number, (count,), generator=generator)
        person[:number] = torch.arange(number)  # a source needs all its classes
        camid = (person * 7 + torch.randint(5, (count,), generator=generator)) % cameras
        start = torch.randint(250_000, (number, cameras), generator=generator)
        frame = start[person, camid] + torch.randint(250, (count,), generator=generator)
        persons.append(person + first_person)
        camids.append(camid + first_camera)
        frames.append(frame)
        domains.append(torch.full((count,), domain))
        first_person, first_camera = first_person + number, first_camera + cameras
    return Layout(*map(torch.cat, (persons, camids, frames, domains)))


def make_rows(layout: Layout, dim: int, seed: int, epoch: int) -> Tensor:
    """Unit features (N, D): a person, looks shared with others, a camera's shift, noise.

    Args:
        layout: N images.
        dim: D.
        seed: Of everything but the noise.
        epoch: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    persons, cameras = int(layout.person.max()) + 1, int(layout.camid.max()) + 1

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dim, generator=generator)

    looks = draw(persons // 8 + 1)[torch.arange(persons) // 8]
    centre, shift = 0.8 * looks + draw(persons), 0.6 * draw(cameras)
    place, visit_of = torch.unique(layout.person * cameras + layout.camid, return_inverse=True)
    visit = 0.7 * draw(len(place))
    visit += centre[place // cameras] + shift[place % cameras]
    rows = torch.empty(len(layout.person), dim)
    generator.manual_seed(1 + seed + 1000 * epoch)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        rows[part] = F.normalize(visit[visit_of[part]] + 1.2 * draw(len(rows[part])), dim=1)
    return rows


def make_features(
    layout: Layout, records: Sequence[ImageRecord], shapes: Shapes, epoch: int, raw: bool
) -> FeatureSet:
    """Features as extraction gives them: each bank contiguous in memory."""
    unit = torch.empty(shapes.banks, len(records), shapes.dim)
    for bank in range(shapes.banks):
        unit[bank] = make_rows(layout, shapes.dim, bank, epoch)
    test = make_rows(layout, shapes.test, shapes.banks, epoch) if shapes.test else unit[0]
    pids = torch.tensor([record.pid for record in records])
    return FeatureSet(
        test, unit.transpose(0, 1), pids, layout.camid, layout.domain, layout.frame,
        torch.ones(len(records), dtype=torch.bool),
        30 * unit[0] if raw else None,
    )  # fmt: skip


def make_stage(name: str, images: int, shapes: Shapes) -> LabelStage:
    """The label stage of a method, ready to run, with the features of its next epoch."""
    case = CASES[name]
    config = read_case(case, images)
    layout = make_layout(images, case.source)
    columns = zip(*(column.tolist() for column in layout), strict=True)
    sources = config.datasets.source_domains if case.source else 0
    records = [
        ImageRecord(f"{i}.jpg", person if domain < sources else -1, camid, domain, frame)
        for i, (person, camid, frame, domain) in enumerate(columns)
    ]
    records = hide_target_identities(records, sources)
    labellers = build_labellers(config, records, name)
    labeller = labellers[case.stage]
    criteria = [
        build_criterion(
            config.of_stage(number).criterion,
            embed_dim=shapes.dim, num_parts=shapes.banks - 1,
            num_classes=each.count_classes(records), num_cameras=len(layout.camid.unique()),
            source_domains=sources,
        )
        for number, each in enumerate(labellers[: 1 + case.stage % len(labellers)])
    ]  # fmt: skip
    if len(criteria) > 1:
        labeller.begin_stage(0, criteria[-2])
    if case.state:
        labeller.load_state_dict(case.state)
    return _prepare(
        case, config.of_stage(case.stage), labeller, criteria[-1], layout, records, shapes
    )


def _prepare(
    case: Case,
    config: Config,
    labeller: Any,
    criterion: Criterion,
    layout: Layout,
    records: Sequence[ImageRecord],
    shapes: Shapes,
) -> LabelStage:
    """Builds the hook and runs the epochs that are not measured."""
    is_target = layout.domain == layout.domain.max()
    images = ReadyImages("synthetic", records, ())
    sampler = build_sampler(config)
    sampler.set_domains(layout.domain)
    writer = Recorder(Path(tempfile.gettempdir()) / "unused")
    given = LabelledImages(images, images, is_target.nonzero()[:, 0], layout.person)
    hook = RefreshPseudoLabels(labeller, given, sampler, criterion, writer, config.on_collapse)
    trainer = SimpleNamespace(
        inference_model=None, clustered_model=None, device=torch.device("cpu"), epoch=0, step=0
    )
    stage = LabelStage(hook, trainer, images, writer, range(0))
    first = case.epoch - case.before
    for epoch in range(first, case.epoch + 1):
        images.ready[:] = [make_features(layout, records, shapes, epoch, labeller.needs_raw)]
        stage.epochs = range(epoch, epoch + 1)
        if epoch < case.epoch:
            stage.run()
    stage.epochs = range(case.epoch, case.epoch + case.epochs)
    return stage


def run_stage(stage: LabelStage) -> Mapping[str, float]:
    """The work that is measured; gives the numbers of the labels."""
    return stage.run()


def measure_case(name: str, images: int) -> tuple[Shapes, Measured]:
    """Measures a method in a new process, after a small run that compiles what needs it."""
    shapes = find_shapes(CASES[name])
    small = (name, SMALL, shapes)
    return shapes, measure(run_stage, make_stage, name, images, shapes, warm_up=small)


def make_row(name: str, images: int, shapes: Shapes, measured: Measured) -> dict[str, Any]:
    """A method's line of the table."""
    case, numbers = CASES[name], measured.result
    dims = f"{shapes.banks} x {shapes.dim}" + (f" + {shapes.test}" if shapes.test else "")
    return {
        "method": name,
        "label stage": case.does,
        "features": dims,
        "CPU s": round(measured.cpu_seconds, 1),
        "s": round(measured.seconds, 1),
        "MB": round(measured.extra_mb),
        "MB without files": round(measured.private_mb),
        "clusters": int(numbers["clusters"]),
        "outliers": int(numbers["outliers"]),
        "published": "; ".join(
            f"{array.what} {array.gigabytes(images):.1f} GB" for array in case.published
        ),
    }


def main() -> None:
    """Parses the arguments, measures each method, prints a line for each and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--methods", nargs="+", choices=CASES, default=[*CASES], metavar="NAME",
        help=f"of {', '.join(CASES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=IMAGES, help="N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.images < SMALL:
        parser.error(f"--images: expected {SMALL} or more, got {arguments.images}")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)  # the measured process reads them
    rows = []
    for name in arguments.methods:
        shapes, measured = measure_case(name, arguments.images)
        rows.append(make_row(name, arguments.images, shapes, measured))
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
        sys.stdout.flush()
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch "
        f"{torch.__version__}, {arguments.images:,} images\n"
        f"{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}\n"
    )


if __name__ == "__main__":
    main()
