"""Which networks are clustered and tested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.hooks.choose_networks import ChooseNetworks, MeanNetwork
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings


class Fixed(nn.Module):
    """Gives the same features whatever the images; test features are the first bank or others."""

    def __init__(self, unit: Tensor, test: Tensor | None = None) -> None:
        super().__init__()
        self.unit = unit
        self.test = test

    def forward(self, batch: Batch) -> Embeddings:
        test = self.unit[:, 0] if self.test is None else self.test
        return Embeddings(2 * self.unit, 3 * self.unit, self.unit, test)


def banks(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(3, 2, 4, generator=generator), dim=2)


def run_of(**networks: nn.Module) -> Any:
    student = networks.pop("student")
    return SimpleNamespace(
        students={"student": student}, networks=networks, inference_model=student,
        clustered_model=None, also_tested={},
    )  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_the_mean_of_two_networks_is_clustered(normalize: bool) -> None:
    one, two, batch = banks(0), banks(1), Batch.of(torch.zeros(3, 1))
    trainer = run_of(student=Fixed(one), teacher=Fixed(two))
    hook = ChooseNetworks(("student", "teacher"), ("teacher", "student"), normalize)
    hook.before_train(trainer)
    found = trainer.clustered_model(batch)
    mean = (one + two) / 2
    expected = F.normalize(mean, dim=2) if normalize else mean
    torch.testing.assert_close(found.unit, expected)
    torch.testing.assert_close(found.test, expected[:, 0])
    assert found.test.data_ptr() == found.unit.data_ptr(), "the first bank is not stored twice"
    torch.testing.assert_close(found.pre, 2 * mean)
    torch.testing.assert_close(found.post, 3 * mean)
    assert trainer.inference_model is trainer.networks["teacher"]
    assert trainer.also_tested == {"student": trainer.students["student"]}


def test_test_features_of_their_own_are_averaged_too() -> None:
    tests = [F.normalize(torch.randn(3, 7), dim=1) for _ in range(2)]
    network = MeanNetwork([Fixed(banks(i), test) for i, test in enumerate(tests)])
    found = network(Batch.of(torch.zeros(3, 1)))
    torch.testing.assert_close(found.test, F.normalize(tests[0] + tests[1], dim=1))


def test_one_network_is_taken_as_it_is() -> None:
    trainer = run_of(student=Fixed(banks(0)), teacher=Fixed(banks(1)))
    ChooseNetworks(("teacher",), ("student",)).before_train(trainer)
    assert trainer.clustered_model is trainer.networks["teacher"]
    assert trainer.inference_model is trainer.students["student"]
    assert trainer.also_tested == {}


def test_what_is_refused() -> None:
    trainer = run_of(student=Fixed(banks(0)))
    with pytest.raises(ConfigError, match=r"names 'teacher2', the run has student; it must come"):
        ChooseNetworks(("student",), ("teacher2",)).before_train(trainer)
    for cluster, test in (((), ("student",)), (("student", "student"), ("student",))):
        with pytest.raises(ValueError, match="expected different networks"):
            ChooseNetworks(cluster, test)
