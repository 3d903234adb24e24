"""One forward pass of model and criterion."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid import distributed
from reid.modeling.classifiers import classifiers_of
from reid.modeling.losses import STUDENT, Criterion, Source
from reid.modeling.network_outputs import find_weights, recorded_outputs
from reid.modeling.weights import fits_any
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings

Seen = tuple[dict[Source, Embeddings], Batch]
"""What `Criterion.commit` needs of a batch: detached embeddings, and the batch without pixels."""


class Step(nn.Module):
    """Students and criterion as one module, so that DistributedDataParallel sees all of them.

    With several processes, each runs the students on its share of the batch and gathers the
    embeddings of the others. So every loss sees the whole batch, finds hard samples in all of it,
    and need not know how many processes there are. The gradients that DistributedDataParallel
    averages then equal those of one process with the whole batch.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        criterion: Criterion,
        networks: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.model = students[STUDENT[0]]
        self.more_students = nn.ModuleDict(
            {name: student for name, student in students.items() if name != STUDENT[0]}
        )
        self._students = dict(students)
        self.criterion = criterion
        # Kept as a plain mapping, not as submodules, because they are not trained.
        self._networks = networks
        # Each process has the whole batch's gradient of these already; and their size changes.
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.weight" for name, _ in classifiers_of(self)
        ]

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Seen]:
        """The losses by name, and the arguments for `Criterion.commit`."""
        embeddings = {source: self._embed(batch, *source) for source in self.criterion.asks_for}
        # Losses do not use pixels, so these are not sent to the other processes.
        gathered = batch.without_pixels().map(distributed.gather_rows)
        losses: dict[str, Tensor] = self.criterion(embeddings, gathered)
        # Recorded outputs are large, and no memory is made of them.
        lasting = {source: self._without_named(value) for source, value in embeddings.items()}
        seen = {source: value.map(Tensor.detach) for source, value in lasting.items()}
        return losses, (seen, gathered)

    def _embed(self, batch: Batch, network: str, view: int) -> Embeddings:
        """The embeddings of the whole batch, from all processes."""
        if view:
            batch = batch._replace(image=batch.views[view - 1])
        if network in self._students:
            student = self._students[network]
            with recorded_outputs(student, self.criterion.network_outputs) as outputs:
                share: Embeddings = student(batch)
            share = share._replace(aux={**share.aux, **outputs})
            whole = share.map(distributed.gather_with_gradient)
            weights = find_weights(student, self.criterion.network_weights)
            return whole._replace(aux={**whole.aux, **weights})
        if network not in self._networks:
            known = ", ".join([*self._students, *self._networks])
            raise ConfigError(
                f"criterion: a loss asks for the network {network}, the run has {known}; "
                "model.students adds a student, the hook MeanTeacher a teacher"
            )
        with torch.no_grad():
            share = self._networks[network](batch)
            return share.map(distributed.gather_rows)

    def _without_named(self, embeddings: Embeddings) -> Embeddings:
        """The embeddings without what `_embed` adds."""
        outputs, weights = self.criterion.network_outputs, self.criterion.network_weights
        if not outputs and not weights:
            return embeddings
        aux = {
            name: value
            for name, value in embeddings.aux.items()
            if name not in outputs and not fits_any(name, weights)
        }
        return embeddings._replace(aux=aux)


def build_step(
    students: Mapping[str, nn.Module], criterion: Criterion, networks: Mapping[str, nn.Module]
) -> nn.Module:
    """A `Step`, which averages the gradients of all processes if there are several."""
    step = Step(students, criterion, networks)
    if not distributed.is_distributed():
        return step
    # A former step of these networks adds its own averaging to the parameters until it is freed.
    gc.collect()
    # Finding them lets parameters that no loss uses keep `grad=None`, as with one process.
    return DistributedDataParallel(step, find_unused_parameters=True)
