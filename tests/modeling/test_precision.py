from __future__ import annotations

import copy

import torch
from torch import nn

from reid.modeling.precision import Float32Conv2d, keep_strided_convolutions_exact


def test_only_strided_convolutions_change_and_names_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1),
                          nn.Conv2d(4, 4, 1, stride=2))  # fmt: skip
    names = list(model.state_dict())
    assert keep_strided_convolutions_exact(model) == 1
    assert [type(layer) for layer in model] == [Float32Conv2d, nn.Conv2d, nn.Conv2d]
    assert list(model.state_dict()) == names
    assert isinstance(copy.deepcopy(model)[0], Float32Conv2d)


def test_the_gradient_on_maps_of_one_pixel_is_that_of_float32() -> None:
    """torch leaves parts unwritten in bfloat16; we fill memory first, so that they show."""
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 3, stride=2, padding=1)
    exact = copy.deepcopy(plain)
    keep_strided_convolutions_exact(nn.Sequential(exact))
    for height in (1, 2):
        image = torch.randn(4, 16, height, 1)
        for layer, amp in ((plain, False), (exact, True)):
            filled = torch.full((16, 16, 3, 3), 1e30)
            del filled
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                layer(image).float().square().sum().backward()
        torch.testing.assert_close(exact.weight.grad, plain.weight.grad)
