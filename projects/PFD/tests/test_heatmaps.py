"""Heatmaps from files, of drawn persons, and made with a public network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.data.loaders import eval_loader
from reid.data.synthetic import draw_image, synthesise_camera, synthesise_person
from reid.data.synthetic.cameras import CameraStyle, PictureStyle
from reid.data.transforms import ImageTransform
from reid.projects.pfd import (
    HEATMAP,
    JOINTS,
    DrawnHeatmaps,
    PoseHeatmaps,
    heatmaps_of_joints,
    write_heatmaps,
)
from reid.structures import DataError, ImageRecord

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    path = tmp_path / "set" / "query" / "0001_c1s1_000001_00.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (32, 64)).save(path)
    return path


def estimate(pixels: np.ndarray) -> np.ndarray:
    assert pixels.shape == (64, 32, 3)
    return np.random.default_rng(0).random((17, 24, 18)).astype(np.float32)


def test_files_are_written_and_read(image: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    assert write_heatmaps([image], estimate, progress=lambda *of: told.append(of)) == 1
    assert told == [(1, 1)]
    file = tmp_path / "heatmaps" / "set" / "query" / f"{image.name}.npy"
    assert np.load(file).dtype == np.float16
    assert write_heatmaps([image], lambda _: pytest.fail("it is there already")) == 0
    record = ImageRecord(str(image))
    values = PoseHeatmaps().read(record)
    np.testing.assert_allclose(values, estimate(np.zeros((64, 32, 3))), atol=1e-3)
    transform = ImageTransform((64, 32), MEAN, STD, maps=[PoseHeatmaps()])
    (batch,) = eval_loader([record], transform, batch_size=1)
    assert batch.side[HEATMAP].shape == (1, 17, 16, 8)
    too_large = np.full((17, 4, 4), -1e6, np.float32)
    other = image.with_name("other.jpg")
    other.write_bytes(image.read_bytes())
    with pytest.raises(DataError, match=rf"{other}: estimate in float16: .* not finite"):
        write_heatmaps([other], lambda _: too_large)
    assert not PoseHeatmaps().file(str(other)).exists()
    elsewhere = PoseHeatmaps(folder=str(tmp_path / "other"))
    assert write_heatmaps([image], estimate, elsewhere) == 1
    assert (tmp_path / "other" / "set" / "query" / f"{image.name}.npy").is_file()


def test_images_without_heatmaps_are_named(image: Path, tmp_path: Path) -> None:
    record = ImageRecord(str(image))
    transform = ImageTransform((64, 32), MEAN, STD, maps=[PoseHeatmaps()])
    said = rf"{image}: has no heatmaps \(1 of 1 images have none\), expected them in {tmp_path}"
    with pytest.raises(DataError, match=f"{said}.*README"):
        eval_loader([record], transform, batch_size=1)
    with pytest.raises(DataError, match=f"{image}: has no heatmaps .*no such file"):
        PoseHeatmaps().read(record)
    with pytest.raises(DataError, match=r"elsewhere/a\.jpg: has no heatmaps.*ROOT"):
        PoseHeatmaps().check([ImageRecord("/elsewhere/a.jpg")])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((16, 4, 4), np.float32), r"expected floats \(17, h, w\).*float32 \(16, 4, 4\)"),
        (np.zeros((17, 4, 4), np.uint8), "expected floats.*uint8"),
        (np.full((17, 4, 4), np.nan), "not finite"),
        (np.full((17, 4, 4), 255.0), "largest number is 255; expected confidences.*divide levels"),
        (np.full((17, 4, 4), 1e300), "not finite"),  # too large for float32
        (np.array([{"a": 1}]), r"is no \.npy file"),
        (None, r"is no \.npy file"),
    ],
)
def test_broken_files_are_named(image: Path, values: Any, said: str) -> None:
    file = PoseHeatmaps().file(str(image))
    file.parent.mkdir(parents=True)
    if values is None:
        file.write_bytes(b"no array")
    else:
        np.save(file, values, allow_pickle=True)
    with pytest.raises(DataError, match=f"{image}: .*{said}"):
        PoseHeatmaps().read(ImageRecord(str(image)))


def test_blobs_have_their_peak_at_the_joint() -> None:
    joints = np.array([[4.5, 10.5, 0.8], [20.0, 3.0, 0.0], [-9.0, -9.0, 0.5]], np.float32)
    values = heatmaps_of_joints(joints, (64, 32))
    assert values.shape == (3, 64, 32)
    assert np.unravel_index(values[0].argmax(), (64, 32)) == (10, 4)
    assert values[0].max() == pytest.approx(0.8)
    assert not values[1].any()
    assert np.isfinite(values).all()


def test_joints_of_drawn_persons() -> None:
    """They change no picture, are where limbs are, and know what stands in front of them."""
    rng = np.random.default_rng
    person = synthesise_person(rng(0))
    calm = PictureStyle(turn=0, shift=0, zoom=0, pole=0, crowd=0, shade=0)
    camera = synthesise_camera(rng(1), CameraStyle(pitch=(0.0, 0.0)), calm)
    noted: list[np.ndarray] = []
    plain = draw_image(person, camera, rng(2), 128, 64)
    again = draw_image(person, camera, rng(2), 128, 64, note_joints=noted.append)
    assert np.array_equal(plain, again)
    (joints,) = noted
    assert joints.shape == (len(JOINTS), 3)
    assert (joints[:, 2] == 1).all()
    place = dict(zip(JOINTS, joints[:, :2], strict=True))
    for above, below in (("nose", "left_shoulder"), ("left_shoulder", "left_hip"),
                         ("right_hip", "right_knee"), ("right_knee", "right_ankle")):  # fmt: skip
        assert place[above][1] < place[below][1]
    nobody: list[np.ndarray] = []
    draw_image(None, camera, rng(2), 128, 64, note_joints=nobody.append)
    assert not nobody
    behind = synthesise_camera(rng(1), None, PictureStyle(pole=1.0, crowd=1.0))
    for seed in range(12):
        draw_image(person, behind, rng(seed), 128, 64, note_joints=noted.append)
    peaks = np.stack(noted[1:])[:, :, 2]
    assert peaks.min() == 0
    assert (peaks == 0).mean() > 0.05
    assert (peaks == 1).mean() > 0.3


def test_heatmaps_of_drawn_persons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    persons = SyntheticPersons(num_train=3, num_test=2, num_cameras=2, num_distractors=3)
    records = [r for s in ("train", "query", "gallery") for r in persons.load(s)]  # type: ignore[arg-type]
    source = DrawnHeatmaps()
    source.check(records)
    for record in records:
        values = source.read(record)
        assert values.shape == (17, 32, 16)
        assert 0 <= values.min() <= values.max() <= 1
    with pytest.raises(DataError, match=r"a\.jpg: its joints are not known.*drawn anew"):
        source.check([ImageRecord(str(persons.folder / "query" / "a.jpg"))])
    with pytest.raises(DataError, match="SyntheticPersons alone"):
        source.check([ImageRecord(str(tmp_path / "b" / "c" / "a.jpg"))])


def test_the_recipe_of_the_readme(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as it stands there; the network that it downloads is replaced."""

    class FirstFindsTwo(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            (seen,) = images
            assert seen.shape == (3, 64, 32)
            assert float(seen.max()) <= 1
            keypoints = torch.zeros(2, 17, 3)
            keypoints[0, :, 0], keypoints[0, :, 1] = 8.5, 48.5
            logits = torch.full((2, 17), 9.0)
            logits[0, 5] = -9
            return [{"scores": torch.tensor([0.9, 0.2]), "keypoints": keypoints,
                     "keypoints_scores": logits}]  # fmt: skip

    detection = torchvision.models.detection
    monkeypatch.setattr(detection, "keypointrcnn_resnet50_fpn", lambda weights: FirstFindsTwo())
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (recipe,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S)
                 if "keypointrcnn" in code]  # fmt: skip
    names: dict[str, Any] = {"Market1501": lambda: None}
    start, _, rest = recipe.partition("dataset = ")
    listed = [ImageRecord(str(image))]
    only = type("Only", (), {"load": lambda _, split: listed if split == "query" else []})
    names["dataset"] = only()
    exec(start + rest.partition("\n")[2], names)
    values = PoseHeatmaps().read(listed[0])
    assert np.unravel_index(values[0].argmax(), values.shape[1:]) == (48, 8)
    assert values[0].max() > 0.99
    assert values[5].max() < 0.01
