"""BatchNorm with a half for each of two domains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reid.modeling.heads import Neck
from reid.structures import Batch

Domain = Literal["source", "target"]


class DomainSplit:
    """How many of a batch's images are the source's: what all layers of a network share.

    Args:
        source_domains: How many of the joined training sets, from the first on, are sources.

    Attributes:
        count: Images of the source in the batch that is on its way.
        tested: The domain whose statistics are used in evaluation.
        sizes: (source, target) images of a whole batch of this process, if they are known.
    """

    def __init__(self, source_domains: int) -> None:
        self._source_domains = source_domains
        self.count = 0
        self.tested: Domain = "target"
        self.sizes: tuple[int, int] | None = None

    def see(self, batch: Batch) -> None:
        """Counts a batch's source images, which come first.

        A batch of the size that is known is not looked at, so that a GPU need not be waited for.
        """
        if self.sizes is not None and len(batch.domain) == sum(self.sizes):
            self.count = self.sizes[0]
        else:
            self.count = int((batch.domain < self._source_domains).sum())


class DomainBatchNorm(nn.Module):
    """A BatchNorm for the source and one for the target (SpCL, Ge et al., NeurIPS 2020).

    In training, the source's images, which come first in the batch, go through one, the others
    through the other. In evaluation all go through the target's, unless `statistics_of` says
    otherwise.

    Args:
        like: The layer that both halves begin as.
        split: Says how many images are the source's.

    Attributes:
        source: One half.
        target: The other half.
    """

    def __init__(self, like: _BatchNorm, split: DomainSplit) -> None:
        super().__init__()
        self.target = like
        self.source = copy.deepcopy(like)
        self._split = split

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, ...) to the same."""
        if not self.training:
            half = self.source if self._split.tested == "source" else self.target
            normalised: Tensor = half(input)
            return normalised
        count = self._split.count
        parts = (self.source, input[:count]), (self.target, input[count:])
        return torch.cat([half(part) for half, part in parts if len(part)])


def split_batch_norms(model: nn.Module, source_domains: int) -> DomainSplit:
    """Gives every BatchNorm of a model a half for each domain; both begin as the layer was.

    The biases of necks, which are frozen elsewhere, are trained here, as in the published code.

    Args:
        model: Changed in place; must tell the split of each batch (`DomainSplit.see`).
        source_domains: How many of the joined training sets, from the first on, are sources.
    """
    split = DomainSplit(source_domains)
    for name, module in [*model.named_modules()]:
        if not isinstance(module, _BatchNorm):
            continue
        if isinstance(module, Neck) and module.bias is not None:
            module.bias.requires_grad_(True)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, DomainBatchNorm(module, split))
    return split


def has_domains(model: nn.Module) -> bool:
    """Whether a model has layers with a half for each domain."""
    return any(isinstance(module, DomainBatchNorm) for module in model.modules())


@contextmanager
def statistics_of(model: nn.Module, domain: Domain) -> Iterator[None]:
    """Evaluates with the statistics of a domain; changes nothing in a plain network."""
    splits = {m._split for m in model.modules() if isinstance(m, DomainBatchNorm)}
    before = {split: split.tested for split in splits}
    for split in splits:
        split.tested = domain
    try:
        yield
    finally:
        for split in splits:
            split.tested = before[split]


def plain_state(model: nn.Module, domain: Domain = "target") -> dict[str, Tensor]:
    """The state of a network as that of a plain one, with the halves of one domain.

    Args:
        model: With or without `DomainBatchNorm`.
        domain: Whose halves.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, DomainBatchNorm):
            continue
        for half in ("source", "target"):
            start = f"{name}.{half}."
            for key in [key for key in state if key.startswith(start)]:
                value = state.pop(key)
                if half == domain:
                    state[f"{name}.{key.removeprefix(start)}"] = value
    return state
