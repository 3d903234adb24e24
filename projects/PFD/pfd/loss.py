"""PFD's losses on parts, on slots, and between visible and hidden features."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.losses import Banks, CrossEntropy, Loss, Margin, Triplet
from reid.registry import LOSS, ConfigError, Range
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels


@LOSS.register()
class PFDLoss(Loss):
    """Cross entropy and triplet loss of both halves of `PFDHead`, and of what is hidden.

    PFD, equations of section "Training"; a half is the parts or the slots. Of each half the first
    feature has weight 1/2 and the mean of the 17 others 1/2, with a classifier for each feature.
    The halves have weight 1/2 each. Slots of zeros take part, as published.

    The last term is the mean of (1 - cos(c, o)) / 2 of the visible feature c and the hidden feature
    o. Minimised as in the published code, it pulls the two together. An image counts as 0 where o
    is 0, as in a batch that shows every joint, which gives NaN in the published code.

    Args:
        embed_dim: D.
        num_parts: K of the head.
        num_classes: Identities of the training set.
        smoothing: See `CrossEntropy`.
        init_std: See `CrossEntropy`.
        margin: See `Triplet`.
        hidden: `together`, as published, or `apart`: the mean of (1 + cos(c, o)) / 2, as the
            method's text has it.

    Raises:
        ValueError: There are fewer than two classes, or a number is out of its range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_parts: int,
        num_classes: int,
        smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1,
        init_std: Annotated[float, Range(0, 1e3, above=True)] = 0.001,
        margin: Margin = None,
        hidden: Literal["together", "apart"] = "together",
    ) -> None:
        super().__init__()

        def half() -> nn.ModuleList:
            losses: list[Loss] = []
            kinds: tuple[Banks, Banks] = ("global", "parts")
            for banks in kinds:
                losses.append(
                    CrossEntropy(
                        embed_dim, num_classes, smoothing, init_std=init_std, banks=banks,
                        num_parts=num_parts,
                    )
                )  # fmt: skip
                losses.append(Triplet(margin, banks=banks, num_parts=num_parts))
            return nn.ModuleList(losses)

        self.parts, self.slots = half(), half()
        self._sign = 1.0 if hidden == "together" else -1.0

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the identities as classes.

        Raises:
            ValueError: The number of classes is not that of the classifiers.
        """
        super().set_labels(labels, features)
        for loss in cast("list[Loss]", [*self.parts, *self.slots]):
            loss.set_labels(labels, features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`pfd_parts`, `pfd_slots` and `pfd_hidden`; their sum is the published loss.

        Raises:
            ConfigError: The model has another head.
        """
        aux = embeddings.aux
        if "slots_pre" not in aux:
            raise ConfigError("criterion: PFDLoss needs MODEL.HEAD {NAME: PFDHead}")
        slots = embeddings._replace(pre=aux["slots_pre"], post=aux["slots_post"])
        return {
            "pfd_parts": _half(self.parts, embeddings, batch),
            "pfd_slots": _half(self.slots, slots, batch),
            "pfd_hidden": self._hidden(aux["slots_post"][:, 0].float(), aux["hidden"].float()),
        }

    def _hidden(self, visible: Tensor, hidden: Tensor) -> Tensor:
        cosine = (F.normalize(visible, dim=1) * F.normalize(hidden, dim=1)).sum(1)
        there = (hidden != 0).any(1)
        return (there * (1 - self._sign * cosine) / 2).mean()


def _half(losses: nn.ModuleList, embeddings: Embeddings, batch: Batch) -> Tensor:
    """Half of the weighted sum over the first feature and the others."""
    values = [value for loss in losses for value in loss(embeddings, batch).values()]
    return torch.stack(values).sum() / 4
