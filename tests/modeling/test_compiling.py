from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from reid.modeling.compiling import compile_network
from reid.structures import Batch, Embeddings


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, batch: Batch) -> Embeddings:
        bank = torch.relu(self.layer(batch.image))[:, None] + batch.camid[:, None, None]
        return Embeddings(bank, bank, bank * 2, bank[:, 0])


def call(network: nn.Module, batch: int) -> tuple[Embeddings, Tensor]:
    """Embeddings, and the gradient of the weights."""
    image = torch.linspace(-1, 1, batch * 6).reshape(batch, 6)
    embeddings = network(Batch.of(image, torch.arange(batch)))
    network.zero_grad()
    embeddings.unit.square().sum().backward()
    gradient = network.layer.weight.grad
    return embeddings, gradient.clone()


def test_without_a_compiler_the_network_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network()
    expected = call(copy.deepcopy(network), 3)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no_compiler_of_this_name",))
    compile_network(network)
    with caplog.at_level(logging.WARNING):
        found = call(network, 3)
        call(network, 5)
    messages = [r.getMessage() for r in caplog.records if r.name == "reid.modeling.compiling"]
    assert len(messages) == 1
    assert messages[0].startswith("The network cannot be compiled and runs uncompiled: ")
    assert "no_compiler_of_this_name" in messages[0] or "compiler" in messages[0].lower()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_errors_of_the_network_pass_unchanged() -> None:
    network = Network()
    compile_network(network)
    with pytest.raises((RuntimeError, TypeError), match=r"shape|size"):
        network(Batch.of(torch.zeros(2, 5)))


@pytest.mark.slow
def test_the_compiled_network_gives_the_same_numbers() -> None:
    network = Network()
    plain = copy.deepcopy(network)
    compile_network(network)
    for batch in (3, 5, 7):  # another size compiles anew, for any size
        torch.testing.assert_close(call(network, batch), call(plain, batch), rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        batch_of_ones = Batch.of(torch.ones(2, 6))
        torch.testing.assert_close(network(batch_of_ones), plain(batch_of_ones))
    assert network.state_dict().keys() == plain.state_dict().keys()
