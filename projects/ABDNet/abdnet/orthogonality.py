"""Losses that keep the rows of maps, and of weights, from being alike (ABD-Net, section 3.2).

The largest and the smallest eigenvalue of F F^T should be near each other. Both are estimated by
one step of the power method each, from random starting vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from reid import distributed
from reid.modeling.losses import Loss
from reid.modeling.weights import fits_any
from reid.registry import LOSS, Range
from reid.structures import Batch, Embeddings

_Scale = Annotated[float, Range(0, 1e6)]


@LOSS.register()
class FeatureOrthogonality(Loss):
    """Orthogonal channels: a penalty on maps inside the network (OF; ABD-Net, section 3.2).

    For the map F (channels x positions) of an image, with lambda_1 and lambda_C the estimated
    largest and smallest eigenvalue of F F^T, the penalty is `beta` (lambda_1 - lambda_C), as in the
    published code; the paper squares the difference. It is summed over the maps. As published, the
    sum over the images is divided by a 32nd of their number, and the mean is taken over the outputs
    of a module that runs once for each part.

    It works with any network: `outputs` names modules that put out maps (B, C, H, W) or tokens
    (B, N, C). With several processes, each gets the maps of the whole batch. Computed in float32
    under mixed precision too. A map of zeros counts 0.

    Args:
        outputs: Factors of the penalties by the names of modules, such as
            `{backbone.net.layer1: 0.01, head.merge: 1}`.
        beta: Factor of all.
        start_epoch: Epoch, from 0, in which the loss begins; in a run with stages, of the stage.

    Raises:
        ValueError: No module is named, or a number is out of its range.
    """

    def __init__(
        self,
        outputs: Mapping[str, _Scale],
        beta: _Scale = 1e-6,
        start_epoch: Annotated[int, Range(0, 1_000_000)] = 0,
    ) -> None:
        super().__init__()
        if not outputs or min(outputs.values()) < 0:
            raise ValueError(
                f"outputs: expected modules, each with a factor from 0, got {dict(outputs)}"
            )
        if beta < 0 or start_epoch < 0:
            raise ValueError(
                f"expected beta and start_epoch of 0 or more, got {beta}, {start_epoch}"
            )
        self.network_outputs = tuple(outputs)
        self._factors = dict(outputs)
        self._beta = beta
        self._start_epoch = start_epoch

    def check_aux(self, aux: Mapping[str, Tensor]) -> None:
        """Checks that the modules put out maps or tokens.

        Raises:
            ValueError: One does not.
        """
        for name in self.network_outputs:
            _as_rows(name, aux[name])

    @property
    def is_active(self) -> bool:
        """Whether the epoch in which it begins has come."""
        return self.epoch >= self._start_epoch

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`feature_orthogonality`; nothing before the epoch in which it begins."""
        if not self.is_active:
            return {}
        given = {name: embeddings.aux[name] for name in self.network_outputs}
        pieces = {name: _as_rows(name, map_) for name, map_ in given.items()}
        generator = shared_generator(embeddings.pre.device)
        starts = {
            name: torch.randn(2, *rows.shape[:3], generator=generator, device=rows.device)
            for name, rows in pieces.items()
        }
        return {"feature_orthogonality": self.penalty(pieces, starts)}

    def penalty(self, maps: Mapping[str, Tensor], starts: Mapping[str, Tensor]) -> Tensor:
        """The penalty with given starting vectors.

        Args:
            maps: (B, pieces, channels, positions) by name.
            starts: (2, B, pieces, channels) by name.
        """
        total = []
        for name, rows in maps.items():
            gaps = eigenvalue_gap(rows.flatten(0, 1), starts[name].flatten(1, 2))
            total.append(self._factors[name] * gaps.mean() * 32)
        return self._beta * torch.stack(total).sum()


@LOSS.register()
class WeightOrthogonality(Loss):
    """Orthogonal filters: a penalty on weights of the network (OW; ABD-Net, section 3.2).

    With F the filters of a convolution (outputs x inputs, and kernel), the penalty is
    10 `beta` (lambda_1 - lambda_C)^2 as above, summed over the layers. The paper has it on all
    convolutions; the published code reaches the first one only, `backbone.net.conv1.weight`.

    It works with any network. Computed in float32 under mixed precision too.

    Args:
        weights: Names of parameters, or patterns (`*`, `?`): `backbone.net.*conv?.weight`. Each has
            two dimensions or more.
        beta: Factor.

    Raises:
        ValueError: No parameter is named, or `beta` is negative.
    """

    def __init__(
        self, weights: Sequence[str] = ("backbone.net.conv1.weight",), beta: _Scale = 1e-3
    ) -> None:
        super().__init__()
        if not weights or beta < 0:
            raise ValueError(
                f"expected weights with one name or more and beta from 0, got {list(weights)}, "
                f"{beta}"
            )
        self.network_weights = tuple(weights)
        self._beta = beta

    def check_aux(self, aux: Mapping[str, Tensor]) -> None:
        """Checks that the parameters have rows.

        Raises:
            ValueError: One has fewer than two dimensions.
        """
        for name, weight in self._named(aux).items():
            if weight.ndim < 2:
                raise ValueError(
                    f"weights: expected parameters of two dimensions or more, but {name} has "
                    f"{tuple(weight.shape)}"
                )

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`weight_orthogonality`."""
        generator = shared_generator(embeddings.pre.device)
        total = []
        for weight in self._named(embeddings.aux).values():
            start = torch.rand(2, len(weight), generator=generator, device=weight.device)
            total.append(self.penalty(weight, start))
        return {"weight_orthogonality": torch.stack(total).sum()}

    def _named(self, aux: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: v for name, v in aux.items() if fits_any(name, self.network_weights)}

    def penalty(self, weight: Tensor, start: Tensor) -> Tensor:
        """The penalty of a layer with given starting vectors (2, outputs)."""
        gap = eigenvalue_gap(weight.flatten(1)[None], start[:, None])
        return 10 * self._beta * gap.square().sum()


def eigenvalue_gap(rows: Tensor, start: Tensor) -> Tensor:
    """Estimates the largest minus the smallest eigenvalue of F F^T.

    With lam(A; x) = u^T A u / u^T u and u = A x: largest = lam(F F^T; x_1), and smallest =
    largest + lam(F F^T - largest I; x_2). Gradients flow through u and through the largest one.
    F F^T is never formed. A quotient 0 / 0 counts 0, with a gradient of 0.

    Args:
        rows: F (B, C, N).
        start: x_1 and x_2 (2, B, C).

    Returns:
        (B,) in float32, or in the precision of `rows` if that is higher.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        first, second = start.to(rows.dtype)[..., None]
        vector = _times(rows, first)
        largest = _quotient((rows.transpose(1, 2) @ vector).square().sum((1, 2)), vector)
        vector = _times(rows, second) - largest[:, None, None] * second
        energy = (rows.transpose(1, 2) @ vector).square().sum((1, 2))
        rest = _quotient(energy - largest * vector.square().sum((1, 2)), vector)
        return -rest


def _times(rows: Tensor, vector: Tensor) -> Tensor:
    """F F^T x (B, C, 1)."""
    return rows @ (rows.transpose(1, 2) @ vector)


def _quotient(energy: Tensor, vector: Tensor) -> Tensor:
    """The energy (B,) divided by the squared norms of vectors (B, C, 1); 0 where these are 0."""
    norm = vector.square().sum((1, 2))
    is_zero = norm == 0
    return torch.where(is_zero, torch.zeros_like(energy), energy / norm.masked_fill(is_zero, 1))


def _as_rows(name: str, map_: Tensor) -> Tensor:
    """A map as (B, pieces, channels, positions).

    Raises:
        ValueError: It is neither a map nor tokens, once or for several pieces.
    """
    if map_.ndim == 3:  # tokens
        return map_.transpose(1, 2)[:, None]
    if map_.ndim == 4:
        return map_.flatten(2)[:, None]
    if map_.ndim == 5:
        return map_.flatten(3)
    raise ValueError(
        f"outputs: expected {name} to put out (B, C, H, W) or (B, N, C), got {tuple(map_.shape)}"
    )


def shared_generator(device: torch.device) -> torch.Generator:
    """A generator with the same numbers on every process; never synchronises a GPU.

    Its seed comes from the main process's stream, as a run with one process has it.
    """
    seed = int(torch.randint(2**31, ()))
    return torch.Generator(device).manual_seed(distributed.main_number(seed))
