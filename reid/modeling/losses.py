"""Losses, each by name; their sum is the criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.triplets import batch_hard_triplet
from reid.registry import LOSS, ConfigError, Range
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels

Banks = Literal["global", "parts", "all"]
"""Which banks of the embeddings a loss takes: the whole image, the parts, or both."""
Margin = Annotated[float, Range(0, 1e6)] | None
Temperature = Annotated[float, Range(1e-4, 1e4)]
Source = tuple[str, int]
"""Where embeddings come from: (name of a network, view of the batch); view 0 = `Batch.image`."""
STUDENT: Source = ("student", 0)


class Loss(nn.Module):
    """What is registered in LOSS.

    A step has two phases. `forward` is pure: it computes losses and changes nothing. `commit`
    follows once the optimizer has taken its step, and moves memories.

    A loss holds the labels and its memory, if it has one. Both are made from the model at the start
    of an epoch, so checkpoints do not hold them. What lasts longer is in `memory_state`.

    Attributes:
        epoch: The epoch of the run, or of the stage in a run with stages, from 0.
        needs_features: Whether the next `set_labels` needs the features of the training images.
        asks_for: The embeddings that `forward` and `commit` are given, in this order. Each is
            computed once in a step, however many losses ask for it. `("teacher", 1)`: those of the
            network `teacher` for the second view. Only those of students carry gradients.
        network_outputs: Modules of the network, by name, such as `backbone.net.layer1`, whose
            outputs `forward` is given in `Embeddings.aux` (see `reid.modeling.network_outputs`).
        network_weights: Patterns (`*`, `?`) of names of the network's parameters, such as
            `backbone.net.conv1.weight`, which `forward` is given in `Embeddings.aux` too.
    """

    epoch: int = 0
    needs_features: bool = False
    asks_for: Sequence[Source] = (STUDENT,)
    network_outputs: Sequence[str] = ()
    network_weights: Sequence[str] = ()
    cluster: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cluster", torch.zeros(0, dtype=torch.int64), persistent=False)

    @property
    def is_active(self) -> bool:
        """Whether it takes part in this epoch; otherwise it is given no outputs and no weights."""
        return True

    def check_aux(self, aux: Mapping[str, Tensor]) -> None:
        """Checks, before training, the outputs and weights that it names, for one image.

        Raises:
            ValueError: The loss cannot take one.
        """

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and the model's features if `needs_features`."""
        self.cluster = labels.cluster

    def kept_features(self) -> FeatureSet | None:
        """Features of the training images that the loss keeps over the epochs; None: it keeps none.

        They are clustered in place of the model's features. Of the images, they need only say
        whether each is `present`.
        """
        return None

    def memory_state(self) -> dict[str, Tensor]:
        """What the next epoch depends on and cannot be made from the model, for checkpoints."""
        return {}

    def check_memory_state(self, state: Mapping[str, Any], count: int) -> None:
        """Checks a state for `load_memory_state`.

        Args:
            state: Part of a checkpoint.
            count: Number of training images.

        Raises:
            ValueError: `memory_state` cannot have returned this state; names the entry.
        """
        if state:
            raise ValueError(f"expected nothing, got {', '.join(map(str, state))}")

    def load_memory_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `memory_state` returned."""

    def followers(self, teacher: str) -> Sequence[tuple[Tensor, Tensor]]:
        """Tensors of the loss that belong to a teacher, each with the student's one it follows.

        The hook `MeanTeacher` moves them as it moves the teacher, such as its classifier's rows.
        """
        return ()

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Named scalar losses; the inputs are the embeddings in `asks_for`, then the batch."""
        raise AssertionError(f"{type(self).__name__} must define forward")

    def commit(self, *inputs: Any, taken: Tensor | None = None) -> None:
        """Moves the memory, after a step of the optimizer.

        Args:
            inputs: The inputs of `forward`, without gradients.
            taken: () bool on the device, false where fp16 overflowed and the optimizer took no
                step: then nothing may move. None: the step was taken.
        """


class Criterion(nn.Module):
    """The weighted losses of a list, by name.

    Args:
        losses: One or more.
        weights: One for each; None: 1.
        names: One for each loss: a prefix of its values' names, or the whole name if it has a
            single value. Empty: the loss's names are used as they are. None: all are empty.

    Raises:
        ValueError: The numbers of losses, weights and names differ, or there is none.
    """

    def __init__(
        self,
        losses: Sequence[Loss],
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else weights
        names = [""] * len(losses) if names is None else names
        if not losses or not len(losses) == len(weights) == len(names):
            raise ValueError(
                "expected losses, a weight and a name for each; got "
                f"{len(losses)}, {len(weights)}, {len(names)}"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)
        self.names = tuple(names)

    def __iter__(self) -> Iterator[Loss]:
        return iter(self.losses)  # type: ignore[arg-type]

    @property
    def needs_features(self) -> bool:
        """Whether one of the losses needs features."""
        return any(loss.needs_features for loss in self)

    @property
    def asks_for(self) -> tuple[Source, ...]:
        """The embeddings that the losses ask for, each once."""
        return tuple(dict.fromkeys(source for loss in self for source in loss.asks_for))

    @property
    def network_outputs(self) -> tuple[str, ...]:
        """The modules whose outputs the losses take in this epoch, each once."""
        return tuple(dict.fromkeys(n for one in self if one.is_active for n in one.network_outputs))

    @property
    def network_weights(self) -> tuple[str, ...]:
        """Patterns of the parameters of the network that the losses take in this epoch."""
        return tuple(dict.fromkeys(n for one in self if one.is_active for n in one.network_weights))

    def set_epoch(self, epoch: int) -> None:
        """Tells each loss the epoch in training, from 0."""
        for loss in self:
            loss.epoch = epoch

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Gives the labels to each loss."""
        for loss in self:
            loss.set_labels(labels, features)

    def followers(self, teacher: str) -> list[tuple[Tensor, Tensor]]:
        """The losses' tensors that belong to a teacher; see `Loss.followers`."""
        return [pair for loss in self for pair in loss.followers(teacher)]

    def forward(self, embeddings: Mapping[Source, Embeddings], batch: Batch) -> dict[str, Tensor]:
        """Named losses times their weights.

        Args:
            embeddings: Those that the losses ask for.
            batch: The same images, row by row.

        Raises:
            ConfigError: Two losses give the same name.
        """
        total: dict[str, Tensor] = {}
        for loss, weight, name in zip(self, self.weights, self.names, strict=True):
            values: dict[str, Tensor] = loss(*(embeddings[key] for key in loss.asks_for), batch)
            if name:
                values = {name if len(values) == 1 else f"{name}_{k}": v for k, v in values.items()}
            doubled = ", ".join(sorted(total.keys() & values.keys()))
            if doubled:
                raise ConfigError(
                    f"criterion: two losses give {doubled}; AS: NAME gives one of them another name"
                )
            total.update({key: weight * value for key, value in values.items()})
        return total

    def commit(
        self, embeddings: Mapping[Source, Embeddings], batch: Batch, taken: Tensor | None = None
    ) -> None:
        """Calls `commit` of each loss; see `Loss.commit`."""
        for loss in self:
            loss.commit(*(embeddings[key] for key in loss.asks_for), batch, taken=taken)


def check_banks(banks: Banks, num_parts: int) -> None:
    """Checks that the model has the banks that a loss takes.

    Raises:
        ValueError: It has no parts.
    """
    if banks != "global" and not num_parts:
        raise ValueError(f"banks: {banks} needs a head with parts, the model's has none")


def select_banks(feature: Tensor, banks: Banks) -> Tensor:
    """The banks (B, M, D) of features (B, 1 + K, D)."""
    if banks == "global":
        return feature[:, :1]
    return feature[:, 1:] if banks == "parts" else feature


@LOSS.register()
class CrossEntropy(Loss):
    """Classification of identities by linear layers, on the features after the neck.

    Each bank has a classifier of its own.

    Args:
        embed_dim: D.
        num_classes: Identities of the training set.
        smoothing: Share of the target that is spread over the classes (label smoothing).
        smooth_true_class: Spread it over all C classes (Szegedy et al. 2016; Luo et al. 2019;
            TransReID-SSL); otherwise over the C - 1 others, as fast-reid does.
        init_std: Standard deviation of the classifiers' normal weights at the start.
        banks: Which features are classified; the loss is the mean over them.
        num_parts: K.
        bias: Whether the classifiers have a bias, which starts at 0.

    Raises:
        ValueError: There is no class, `smoothing` is not in [0, 1), `init_std` is not above 0, or
            the model has no parts.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0,
        smooth_true_class: bool = True,
        init_std: Annotated[float, Range(0, 1e3, above=True)] = 0.001,
        banks: Banks = "global",
        num_parts: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"needs two identities or more, got {num_classes}; it takes the training set's "
                "identities as classes, which only the labeller Identities gives (CLUSTERER: null)"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected 0 <= smoothing < 1, got {smoothing}")
        if not init_std > 0:
            raise ValueError(f"init_std: expected a number above 0, got {init_std}")
        check_banks(banks, num_parts)
        self._num_classes = num_classes
        self._smoothing = smoothing
        self._smooth_true_class = smooth_true_class
        self._banks: Banks = banks
        self.classifier: nn.Linear | None = None
        if banks != "parts":
            self.classifier = nn.Linear(embed_dim, num_classes, bias=bias)
        self.part_classifiers = nn.ModuleList(
            nn.Linear(embed_dim, num_classes, bias=bias)
            for _ in range(num_parts if banks != "global" else 0)
        )
        for layer in self._classifiers():
            nn.init.normal_(layer.weight, std=init_std)
            if bias:
                nn.init.zeros_(layer.bias)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the identities as classes.

        Raises:
            ValueError: The number of classes is not that of the classifiers.
        """
        if labels.num_clusters != self._num_classes:
            raise ValueError(
                f"CrossEntropy: expected {self._num_classes} classes, got {labels.num_clusters}; "
                "it needs identities as labels (CLUSTERER: null)"
            )
        super().set_labels(labels, features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`, mean over the labelled images and the banks; 0 if there are none."""
        target = self.cluster[batch.index]
        feature = select_banks(embeddings.post, self._banks)
        losses = [
            smoothed_cross_entropy(
                classify(bank), target, self._smoothing, smooth_true_class=self._smooth_true_class
            )
            for classify, bank in zip(self._classifiers(), feature.unbind(1), strict=True)
        ]
        return {"cross_entropy": torch.stack(losses).mean()}

    def _classifiers(self) -> list[nn.Linear]:
        first = [] if self.classifier is None else [self.classifier]
        return [*first, *self.part_classifiers]


@LOSS.register()
class Triplet(Loss):
    """Batch-hard triplet loss (Hermans et al., arXiv:1703.07737).

    Args:
        margin: Margin of the hinge; null: the soft margin, log(1 + exp(.)).
        normalize: Take unit vectors instead of raw features.
        feature: Whether to compare features `before` or `after` the neck.
        banks: Which features are compared, each bank on its own; the loss is the mean over them.
        num_parts: K.

    Raises:
        ValueError: The margin is negative, or the model has no parts.
    """

    def __init__(
        self,
        margin: Margin = None,
        normalize: bool = False,
        feature: Literal["before", "after"] = "before",
        banks: Banks = "global",
        num_parts: int = 0,
    ) -> None:
        super().__init__()
        if margin is not None and margin < 0:
            raise ValueError(f"margin: expected 0 or more, or null, got {margin}")
        check_banks(banks, num_parts)
        self._margin = margin
        self._normalize = normalize
        self._feature = feature
        self._banks: Banks = banks

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`triplet`, mean over the banks and the anchors that have a positive and a negative."""
        feature = embeddings.pre if self._feature == "before" else embeddings.post
        feature = select_banks(feature, self._banks).float()
        if self._normalize:
            feature = F.normalize(feature, dim=2)
        label = self.cluster[batch.index]
        losses = [batch_hard_triplet(bank, label, self._margin) for bank in feature.unbind(1)]
        return {"triplet": torch.stack(losses).mean()}


def smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, *, smooth_true_class: bool = True
) -> Tensor:
    """Cross entropy with label smoothing; rows with target -1 are left out.

    Args:
        logits: (B, C).
        target: (B,) int64.
        smoothing: epsilon. The true class gets 1 - epsilon of the target.
        smooth_true_class: epsilon / C on every class, so that the true one has
            1 - epsilon + epsilon / C (Szegedy et al., CVPR 2016); else epsilon / (C - 1) on the
            others alone (fast-reid).

    Returns:
        The mean over the rows with a target; without `smooth_true_class`, their sum divided by the
        number of losses that are not exactly 0, as in fast-reid. 0 if no row has a target.
    """
    logits = logits.float()
    labelled = target != OUTLIER
    if smooth_true_class:
        total = F.cross_entropy(
            logits, target, ignore_index=OUTLIER, label_smoothing=smoothing, reduction="sum"
        )
        return total / labelled.sum().clamp(min=1)
    log_prob = F.log_softmax(logits, dim=1)
    others = smoothing / (logits.shape[1] - 1)
    weights = torch.full_like(log_prob, others)
    weights.scatter_(1, target.clamp(min=0)[:, None], 1 - smoothing)
    losses = -(weights * log_prob).sum(1)[labelled]
    return losses.sum() / losses.count_nonzero().clamp(min=1)
