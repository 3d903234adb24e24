"""One forward pass of model and criterion."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid import distributed
from reid.modeling.losses import STUDENT, Criterion, Source
from reid.structures import Batch, Embeddings

Seen = tuple[dict[Source, Embeddings], Batch]
"""What `Criterion.commit` needs of a batch: detached embeddings, and the batch without pixels."""


class Step(nn.Module):
    """Model and criterion as one module, so that DistributedDataParallel sees both.

    With several processes, each runs the model on its share of the batch and gathers the embeddings
    of the others. So every loss sees the whole batch, finds hard samples in all of it, and need not
    know how many processes there are. The gradients that DistributedDataParallel averages then
    equal those of one process with the whole batch.
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, networks: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        # Kept as a plain mapping, not as submodules, because they are not trained.
        self._networks = networks

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Seen]:
        """The losses by name, and the arguments for `Criterion.commit`."""
        embeddings = {source: self._embed(batch, *source) for source in self.criterion.asks_for}
        # Losses do not use pixels, so these are not sent to the other processes.
        gathered = batch.without_pixels().map(distributed.gather_rows)
        losses: dict[str, Tensor] = self.criterion(embeddings, gathered)
        seen = {source: value.map(Tensor.detach) for source, value in embeddings.items()}
        return losses, (seen, gathered)

    def _embed(self, batch: Batch, network: str, view: int) -> Embeddings:
        """The embeddings of the whole batch, from all processes."""
        if view:
            batch = batch._replace(image=batch.views[view - 1])
        if network == STUDENT[0]:
            share: Embeddings = self.model(batch)
            return share.map(distributed.gather_with_gradient)
        with torch.no_grad():
            share = self._networks[network](batch)
            return share.map(distributed.gather_rows)


def build_step(
    model: nn.Module, criterion: Criterion, networks: Mapping[str, nn.Module]
) -> nn.Module:
    """A `Step`, which averages the gradients of all processes if there are several."""
    step = Step(model, criterion, networks)
    if not distributed.is_distributed():
        return step
    # A former step of this model adds its own averaging to the parameters until it is freed.
    gc.collect()
    # Finding them lets parameters that no loss uses keep `grad=None`, as with one process.
    return DistributedDataParallel(step, find_unused_parameters=True)
