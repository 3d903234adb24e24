"""st-ReID and PCB: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.assembly.hooks import build_evaluator, teach_evaluator
from reid.assembly.images import build_train_images
from reid.config import load_config
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.evaluation.joint_distance import joint_blocks
from reid.evaluation.ranking import rank, rank_distances
from reid.evaluation.spatial_temporal import SpatialTemporalEvaluator, count_model, read_clusters
from reid.evaluation.time_histograms import count_times
from reid.modeling.backbones import TimmBackbone
from reid.modeling.bottleneck_classifiers import BottleneckCrossEntropy
from reid.modeling.heads import StripeHead
from reid.modeling.weights import read_checkpoint
from reid.neighbors import rerank_distances
from reid.registry import ConfigError
from reid.structures import Batch, DataError, FeatureSet, FeatureTokens, ImageRecord, PseudoLabels
from reid.workflows.evaluate import evaluate
from reid.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "configs"


class Wide(nn.Module):
    embed_dim = 16


def arrays(path: Path) -> dict[str, Any]:
    return dict(np.load(path).items())


def images(a: dict[str, Any], name: str) -> FeatureSet:
    column = {key: torch.from_numpy(a[f"{name}_{key}"]) for key in ("pid", "cam", "frame")}
    feature = torch.from_numpy(a[f"{name}_feature"])
    return FeatureSet.of(feature, column["pid"], column["cam"], frames=column["frame"])


def records(a: dict[str, Any]) -> list[ImageRecord]:
    columns = (a[f"train_{key}"].tolist() for key in ("pid", "cam", "frame"))
    return [
        ImageRecord(f"{i}.jpg", pid, cam, frame=frame)
        for i, (pid, cam, frame) in enumerate(zip(*columns, strict=True))
    ]


def evaluator_of(a: dict[str, Any], **options: Any) -> SpatialTemporalEvaluator:
    return SpatialTemporalEvaluator(
        bins=int(a["bins"]), interval=int(a["interval"]), smoothing=float(a["smooth"]),
        alpha=float(a["alpha"]), ap="trapezoid", **options,
    )  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["joint", "sparse"])
def test_histograms_scores_and_figures_of_the_authors(oracle_dir: Path, kind: str) -> None:
    files = sorted(oracle_dir.glob(f"streid_{kind}*.npz"))
    assert files
    for path in files:
        a = arrays(path)
        bins, width = int(a["bins"]), int(a["interval"])
        counts = count_times(
            a["train_pid"], a["train_cam"], a["train_frame"], num_bins=bins, width=width
        )
        place = counts.cameras - 1
        known = np.ix_(place, place)
        shares = counts.normalised().table
        np.testing.assert_allclose(shares, a["histogram"][known], rtol=0, atol=1e-12)
        assert a["histogram"].sum() == pytest.approx(shares.sum())  # no other cameras
        model = count_model(
            a["train_pid"], a["train_cam"], a["train_frame"],
            bins=bins, interval=width, smoothing=float(a["smooth"]),
        )  # fmt: skip
        np.testing.assert_allclose(model.table, a["smoothed"][known], rtol=0, atol=1e-9)
        evaluator = evaluator_of(a)
        evaluator.learn(records(a))
        query, gallery = images(a, "query"), images(a, "gallery")
        plain = rank(query, gallery, ap="trapezoid", needs_match=False)
        found = evaluator.rank_again(plain).ranking
        ap = np.nan_to_num(found.average_precision)  # 0 for queries without a match, as published
        np.testing.assert_allclose(ap, a["ap"], rtol=0, atol=1e-6)
        assert ap.mean() == pytest.approx(float(a["mAP"]), abs=1e-6)
        share = found.num_valid / len(query)
        for k in (1, 5, 10):
            assert found.rank(k) * share == pytest.approx(float(a["cmc"][k - 1]), abs=1e-6)


@pytest.mark.oracle
def test_reranking_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("streid_rerank*.npz"))
    assert files
    for path in files:
        a = arrays(path)
        distance = 1 - a["joint_score"]
        found = rerank_distances(
            lambda i, d=distance: d[:, i].T, len(distance), k1=int(a["k1"]), k2=int(a["k2"]),
            lambda_value=float(a["lambda_"]), subtract_minimum=False,
        )  # fmt: skip
        count = int(a["num_query"])
        rows = found.rows(0, count)[:, count:]
        np.testing.assert_allclose(rows, a["final_distance"], rtol=0, atol=1e-5)


@pytest.mark.oracle
def test_reranking_of_the_evaluator_is_that_of_its_scores(oracle_dir: Path) -> None:
    a = arrays(sorted(oracle_dir.glob("streid_joint*.npz"))[0])
    query, gallery = images(a, "query"), images(a, "gallery")
    evaluator = evaluator_of(a, reranking=True, k1=10, k2=3)
    evaluator.learn(records(a))
    found = evaluator.rank_again(rank(query, gallery, ap="trapezoid", needs_match=False)).ranking
    both = FeatureSet.of(
        *(torch.cat((getattr(query, n), getattr(gallery, n))) for n in ("test", "pids", "camids")),
        frames=torch.cat((query.frames, gallery.frames)),
    )
    model = evaluator._model
    assert model is not None
    ((_, distance),) = joint_blocks(both, both, model)
    again = rerank_distances(
        lambda i: distance[:, i].T, len(both), k1=10, k2=3, subtract_minimum=False
    )
    rows = again.rows(0, len(query))[:, len(query) :]
    expected = rank_distances([(0, rows)], query, gallery, ap="trapezoid")
    np.testing.assert_allclose(found.average_precision, expected.average_precision, atol=1e-12)


@pytest.mark.oracle
def test_pcb_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("streid_pcb*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        parts = int(a["parts"])
        loss = BottleneckCrossEntropy(16, 5, width=8, dropout=0.0, num_parts=parts)
        for number, classifier in enumerate(loss.classifiers):
            names = {"add_block.0": "0", "add_block.1": "1", "classifier.0": "3"}
            start = f"state.classifier{number}."
            state = {}
            for key in (key for key in a if key.startswith(start)):
                layer, _, kind = key.removeprefix(start).rpartition(".")
                state[f"{names[layer]}.{kind}"] = a[key]
            classifier.load_state_dict(state)  # torch adds the counter that the file lacks
        head = StripeHead(Wide(), parts, dropout=0.0)
        map_ = a["feature_map"].clone().requires_grad_()
        batch = Batch.of(a["feature_map"], index=torch.arange(len(map_)))
        loss.set_labels(PseudoLabels.from_clusters(a["label"].long()), None)
        with torch.no_grad():
            close(loss.eval().logits(head.eval()(tokens(map_), batch)), a["eval_logits"])
        loss.train()
        head.train()
        embeddings = head(tokens(map_), batch)
        total = loss(embeddings, batch)["cross_entropy"]
        close(total.detach(), a["loss"])
        total.backward()
        assert map_.grad is not None
        largest = a["grad_feature_map"].abs().max()
        assert (map_.grad - a["grad_feature_map"]).abs().max() <= 1e-5 * largest
        mean = (a["feature_map"] + a["feature_map_flipped"]) / 2  # as `mirror` gives it
        test = head.eval()(tokens(mean), batch).test
        published = a["test_feature"].reshape(len(test), 16, parts).transpose(1, 2).flatten(1)
        close(test, published / parts**0.5)  # each stripe of length 1; here all of them together


def tokens(map_: Tensor) -> FeatureTokens:
    grid = map_.shape[2], map_.shape[3]
    rows = map_.flatten(2).transpose(1, 2)
    return FeatureTokens(torch.cat((rows.mean(1, keepdim=True), rows), 1), grid)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dropout_falls_on_training_features_alone() -> None:
    torch.manual_seed(0)
    head = StripeHead(Wide(), 2, dropout=0.5)
    given = tokens(torch.rand(3, 16, 4, 2) + 1)
    batch = Batch.of(torch.zeros(3, 1))
    found = head.train()(given, batch)
    dropped = (found.pre[:, 1:] == 0).float().mean()
    assert 0.2 < float(dropped) < 0.8
    assert bool((found.pre[:, 0] > 0).all())
    assert found.test.equal(head.eval()(given, batch).test)


def test_mirror_images_have_one_feature_in_evaluation() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("test_resnet", (64, 32), mirror=True)
    image = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        for training, same in ((False, True), (True, False)):
            backbone.train(training)
            one, other = (backbone(Batch.of(x)).tokens[:, 0] for x in (image, image.flip(3)))
            assert torch.allclose(one, other, atol=1e-5) == same


def small(frames: list[int], **options: Any) -> tuple[SpatialTemporalEvaluator, FeatureSet]:
    """Two persons of two cameras, 250 frames apart; a query and a gallery of given frames."""
    evaluator = SpatialTemporalEvaluator(bins=10, smoothing=0, **options)
    evaluator.learn([
        ImageRecord(f"{pid}{cam}.jpg", pid, cam, frame=1000 * pid + 250 * cam)
        for pid in range(2) for cam in (3, 12)
    ])  # fmt: skip
    feature = F.normalize(torch.ones(len(frames), 4), dim=1)
    return evaluator, FeatureSet.of(feature, frames=torch.tensor(frames))


def shares(evaluator: SpatialTemporalEvaluator, *pairs: tuple[int, int, int, int]) -> list[float]:
    model = evaluator._model
    assert model is not None
    table = [np.array(column) for column in zip(*pairs, strict=True)]
    return np.diag(model.shares(*table)).round(3).tolist()


def test_camera_numbers_with_gaps_and_times_beyond_the_last_bin() -> None:
    evaluator, _ = small([0])
    # 9 cameras apart, 2,250 frames: beyond ten bins of 100, which is an index error as published
    assert shares(evaluator, (12, 5000, 3, 0), (3, 5000, 12, 0), (7, 200, 3, 0)) == [0, 0, 0]
    wider = SpatialTemporalEvaluator(bins=30, smoothing=0)
    wider.learn([ImageRecord(f"{c}.jpg", 0, c, frame=250 * c) for c in (3, 12)])
    assert shares(wider, (12, 2250, 3, 0), (12, 2200, 3, 0), (12, 2100, 3, 0)) == [1, 1, 0]
    assert shares(wider, (3, 2250, 12, 0), (3, 0, 12, 2250)) == [0, 1]


def test_images_without_frames_are_an_error() -> None:
    evaluator, one = small([5])
    unknown = FeatureSet.of(one.test, torch.tensor([0]), torch.tensor([3]))
    known = FeatureSet.of(one.test, torch.tensor([0]), torch.tensor([12]), frames=torch.tensor([7]))
    with pytest.raises(ValueError, match="1 of 1 gallery images have no frame number"):
        evaluator.rank_again(rank(known, unknown))
    with pytest.raises(DataError, match="training images: 2 of 2 labelled images have no frame"):
        SpatialTemporalEvaluator().learn([ImageRecord(f"{c}.jpg", 0, c) for c in range(2)])
    with pytest.raises(ValueError, match="needs the training images"):
        SpatialTemporalEvaluator().rank_again(rank(known, known, needs_match=False))


def test_training_images_without_identities_need_clusters(tmp_path: Path) -> None:
    found = [ImageRecord(f"{c}.jpg", -1, c, frame=250 * c) for c in range(3)]
    with pytest.raises(DataError, match=r"no identities to count times by; set CLUSTERS"):
        SpatialTemporalEvaluator().learn(found)
    file = tmp_path / "clusters.csv"
    file.write_text("path,cluster,camera,confidence\n2.jpg,-1,2,\n0.jpg,4,0,1\n1.jpg,4,1,1\n")
    assert read_clusters(file, found).tolist() == [4, 4, -1]
    evaluator = SpatialTemporalEvaluator(clusters=str(file), bins=10, smoothing=0)
    evaluator.learn(found)
    assert shares(evaluator, (1, 250, 0, 0), (2, 250, 1, 0)) == [1, 0]
    with pytest.raises(DataError, match=r"has no cluster for 1 of 1 training images, such as 9\.j"):
        read_clusters(file, [ImageRecord("9.jpg", -1, 0)])
    for text, message in (
        ("a,b\n1,2\n", "expected columns path, cluster, got a, b"),
        ("path,cluster\n0.jpg,x\n", "cannot be read as a clusters.csv"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_clusters(file, found)
    with pytest.raises(DataError, match="cannot be read"):
        read_clusters(tmp_path / "none.csv", found)


@pytest.mark.parametrize(("name", "bins"), [("market", 5000), ("duke", 3000)])
def test_published_hyper_parameters(name: str, bins: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.test.evaluator == {
        "name": "SpatialTemporalEvaluator", "ap": "trapezoid", "interval": 100, "smoothing": 50,
        "alpha": 5, "bins": bins,
    }  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.lr_factors) == ("SGD", 0.1, {"backbone": 0.1})
    assert (solver.nesterov, solver.weight_decay, solver.momentum) == (True, 5e-4, 0.9)
    assert (solver.max_epochs, solver.milestones, solver.gamma) == (60, [40], 0.1)
    assert (config.input.size, config.dataloader.sampler["batch_size"]) == ((384, 192), 32)
    assert config.model.head == {"name": "StripeHead", "num_stripes": 6, "dropout": 0.5}
    assert config.clusterer is None


def settings(folder: Path) -> list[str]:
    persons = ("{NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 4, NUM_CAMERAS: 3, HEIGHT: 64, "
               "WIDTH: 32}")  # fmt: skip
    pairs = {
        "DATASETS.TRAIN": persons, "INPUT.SIZE": "[64, 32]", "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.SAMPLER": "{NAME: ImageSampler, BATCH_SIZE: 16}", "DEVICE": "cpu",
        "MODEL.BACKBONE": "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1, MIRROR: true}",
        "MODEL.BACKBONE_WEIGHTS": "''", "MODEL.HEAD.NUM_STRIPES": 2, "SOLVER.MAX_EPOCHS": 1,
        "SOLVER.MILESTONES": "[]", "CRITERION.0.WIDTH": 8, "OUTPUT_DIR": folder,
    }  # fmt: skip
    return [str(item) for pair in pairs.items() for item in pair]


def walking(record: ImageRecord) -> int:
    """The frames of a person who walks from camera to camera, 300 frames each."""
    return 1000 * (max(record.pid, 0) + 1) + 300 * record.camid


@pytest.fixture
def set_frames(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[ImageRecord], int]], None]:
    """Gives the drawn persons other frames."""
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    load = SyntheticPersons.load

    def apply(frame: Callable[[ImageRecord], int]) -> None:
        monkeypatch.setattr(
            SyntheticPersons,
            "load",
            lambda self, split: [replace(each, frame=frame(each)) for each in load(self, split)],
        )

    return apply


def test_images_without_frames_are_noticed_before_training(
    tmp_path: Path, set_frames: Callable[..., None]
) -> None:
    set_frames(lambda record: -1)
    with pytest.raises(DataError, match="labelled images have no frame number"):
        train(load_config(CONFIGS / "market.yaml", settings(tmp_path)))


def test_a_whole_run_and_eval_only(tmp_path: Path, set_frames: Callable[..., None]) -> None:
    set_frames(walking)
    train(load_config(CONFIGS / "market.yaml", settings(tmp_path)))
    (result,) = json.loads((tmp_path / "results.json").read_text())["final"]
    assert "appearance and time (histograms of identities, 5000 bins" in result["ranked_by"]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.safetensors")]
    again = evaluate(load_config(CONFIGS / "market.yaml", [*settings(tmp_path), *weights]))
    assert [*again.values()] == [result["numbers"]]


def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, set_frames: Callable[..., None]
) -> None:
    set_frames(walking)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    two = ("SOLVER.MAX_EPOCHS", "2")
    train(load_config(CONFIGS / "market.yaml", [*settings(whole), *two]))
    train(load_config(CONFIGS / "market.yaml", settings(parted)))
    train(
        load_config(CONFIGS / "market.yaml", [*settings(parted), *two]),
        resume=True,
        allow_config_change=True,
    )
    states = [read_checkpoint(folder / "model_final.safetensors")[0] for folder in (whole, parted)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_evaluator_learns_one_training_set_with_the_cameras_of_the_test_set() -> None:
    config = load_config(CONFIGS / "market.yaml", ["DATASETS.TEST", "[{NAME: MSMT17}]"])
    evaluator = build_evaluator(config)
    with pytest.raises(ConfigError, match="learns the cameras of Market1501, so it cannot score M"):
        teach_evaluator(evaluator, config, build_train_images(config))
    pairs = ["DATASETS.TRAIN", "[{NAME: Market1501}, {NAME: MSMT17}]"]
    joined = load_config(CONFIGS / "market.yaml", pairs)
    with pytest.raises(ConfigError, match=r"needs one training set, .*datasets.train has 2"):
        teach_evaluator(evaluator, joined, build_train_images(joined))
    with pytest.raises(ConfigError, match=r"datasets.train has 0"):
        teach_evaluator(evaluator, joined, None)
