"""Vectors of cameras and viewpoints, and overlapping patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reid.modeling.side_vectors import check_views, embed_side, start_side_vectors
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights
from reid.solver import build_optimizer
from reid.structures import VIEW, Batch, DataError, ImageRecord

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path": 0.0}


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def test_each_pair_has_a_vector_and_the_unknown_get_means() -> None:
    table = torch.arange(1.0, 13).reshape(3, 2, 2)
    table[1] = 0  # a camera without training images
    found = embed_side(table, ids(0, 2, 2, 1, 7, -1, -1), ids(1, 0, -1, 1, 0, 1, 9))
    of_view = (table[0] + table[2]) / 2
    expected = [table[0, 1], table[2, 0], table[2].mean(0), of_view[1], of_view[0], of_view[1],
                of_view.mean(0)]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected))


def test_cameras_alone_and_viewpoints_alone() -> None:
    cameras = torch.arange(1.0, 7).reshape(3, 1, 2)
    found = embed_side(cameras, ids(0, 2, -1), None)
    torch.testing.assert_close(found, torch.stack([*cameras[[0, 2], 0], cameras.mean((0, 1))]))
    views = cameras.reshape(1, 3, 2)
    torch.testing.assert_close(embed_side(views, None, ids(0, 2, -1)), found)
    with pytest.raises(ValueError, match="cameras, viewpoints or both, got neither"):
        embed_side(views, None, None)


def test_vectors_at_the_start() -> None:
    torch.manual_seed(0)
    table = start_side_vectors(4, 3, 50, [1])
    assert table.shape == (4, 3, 50)
    assert not table[1].any()
    assert table[[0, 2, 3]].std() == pytest.approx(0.02, rel=0.1)
    assert start_side_vectors(0, 3, 8).shape == (1, 3, 8)


def test_viewpoints_of_training_images() -> None:
    def record(**extra: object) -> ImageRecord:
        return ImageRecord("a.jpg", extra=extra)

    check_views([record(view=0), record(view=-1)], 2)
    with pytest.raises(DataError, match=r"a\.jpg: expected a viewpoint from 0 to 1, .* got 2"):
        check_views([record(view=2)], 2)
    with pytest.raises(DataError, match="NUM_VIEWS 2; got None"):
        check_views([record()], 2)
    backbone = ViT((16, 16), num_views=2, **SMALL)
    with pytest.raises(DataError, match="NUM_VIEWS 2"):
        backbone.check_images([record()])
    ViT((16, 16), **SMALL).check_images([record()])


@pytest.mark.parametrize(("cameras", "views"), [(3, 2), (0, 2), (3, 0)])
def test_a_vit_takes_cameras_and_viewpoints(cameras: int, views: int) -> None:
    torch.manual_seed(0)
    net = ViT((32, 16), num_cameras=cameras, camera_embedding=cameras > 0, num_views=views, **SMALL)
    assert net.camera_embed is not None
    assert net.camera_embed.shape == (max(cameras, 1), max(views, 1), 24)
    image = torch.randn(1, 3, 32, 16).expand(4, -1, -1, -1)
    batch = Batch.of(image, ids(0, 0, 1, 1))._replace(side={VIEW: ids(0, 1, 0, 1)})
    tokens = net.eval()(batch).tokens[:, 0]
    different = {(0, 1): views > 0, (0, 2): cameras > 0}
    for (one, other), expected in different.items():
        assert torch.allclose(tokens[one], tokens[other]) != expected
    if views:
        means = net(Batch.of(image, ids(0, 0, 1, 1))).tokens  # without viewpoints: their mean
        assert bool(torch.isfinite(means).all())
        with pytest.raises(ValueError, match="expected a viewpoint for each image as side 'view'"):
            net.train()(Batch.of(image, ids(0, 0, 1, 1)))


def test_a_camera_without_training_images_stays_unknown_in_all_viewpoints() -> None:
    torch.manual_seed(0)
    net = ViT((32, 16), 3, [1], camera_embedding=True, num_views=2, **SMALL)
    steps = build_optimizer(net.parameters(), "Adam", lr=0.1, weight_decay=0.1)
    batch = Batch.of(torch.randn(2, 3, 32, 16), ids(0, 2))._replace(side={VIEW: ids(0, -1)})
    net(batch).tokens.square().mean().backward()
    steps.step()
    assert net.camera_embed is not None
    assert net.camera_embed.detach().any(2).any(1).tolist() == [True, False, True]


def test_rows_of_cameras_times_viewpoints_in_the_authors_files() -> None:
    net = ViT((32, 16), 3, camera_embedding=True, num_views=2, **SMALL)
    state = {name: torch.rand_like(value) for name, value in net.state_dict().items()}
    theirs = state | {"camera_embed": state["camera_embed"].reshape(6, 1, 24)}
    assert ViT.count_cameras(theirs, num_views=2) == ViT.count_cameras(state, num_views=2) == 3
    report = load_weights(net, theirs)
    assert report.resized == ("camera_embed (6, 1, 24) to (3, 2, 24)",)
    torch.testing.assert_close(net.state_dict()["camera_embed"], state["camera_embed"])


def test_overlapping_patches_are_a_convolution_without_padding() -> None:
    torch.manual_seed(0)
    net = ViT((37, 25), patch_size=8, patch_stride=6, **SMALL).eval()
    assert net.grid == (5, 3)
    assert net.net.pos_embed.shape == (1, 16, 24)
    image = torch.randn(1, 3, 37, 25)
    patches = net.net.patch_embed(image)
    weight, bias = net.net.patch_embed.proj.weight, net.net.patch_embed.proj.bias
    expected = (image[:, :, 24:32, 12:20] * weight).sum((1, 2, 3)) + bias
    torch.testing.assert_close(patches[0, 4 * 3 + 2], expected)
    blind = image.clone()
    blind[:, :, 32:] = 9  # pixels that fill no patch are not seen
    blind[:, :, :, 20:] = 9
    torch.testing.assert_close(net(Batch.of(image)).tokens, net(Batch.of(blind)).tokens)


def test_the_position_embedding_of_another_size_or_stride() -> None:
    torch.manual_seed(0)
    wide = ViT((64, 32), patch_size=8, patch_stride=6, **SMALL)  # 10 x 5
    state = wide.state_dict()
    small = ViT((48, 32), patch_size=8, patch_stride=6, **SMALL)  # 7 x 5
    small.trained_size = (64, 32)
    load_weights(small, state)
    found = small.net.pos_embed[0, 1:].reshape(7, 5, 24)
    middle = state["net.pos_embed"][0, 1:].reshape(10, 5, 24)[4:6].mean(0)
    torch.testing.assert_close(found[3], middle, atol=1e-5, rtol=0)
    plain = ViT((64, 32), patch_size=8, **SMALL)  # 8 x 4, without overlap
    small.trained_size = (64, 32)
    load_weights(small, plain.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_stride": 17}, "patch_stride: expected 1 to patch_size 16, got 17"),
        ({"patch_stride": 0}, "patch_stride: expected 1 to patch_size 16, got 0"),
        ({"patch_stride": 12, "stem": "ibn"}, "only the stem patches has overlapping ones"),
    ],
)
def test_strides_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT((32, 16), **SMALL, **options)
    with pytest.raises(ValueError, match="at least the patch size 16"):
        ViT((32, 12), patch_stride=12, **SMALL)
