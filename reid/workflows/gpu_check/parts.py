"""Everything that the sections use of the framework: networks, losses, batches, trainers.

This file imports only torch, timm and the registries; code that needs more is in the sections. It
is long because it is the single place to adapt when the framework changes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reid.projects
from reid.engine.nonfinite import NonFiniteLosses
from reid.engine.optimization import Amp, Optimization
from reid.engine.trainer import Trainer
from reid.evaluation.extract import Precision, extract_features
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.compiling import CompileMode, compile_network
from reid.modeling.losses import STUDENT, Criterion, Loss
from reid.modeling.model import ReIDModel
from reid.registry import BACKBONE, HEAD, LOSS, Hook, build
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, PseudoLabels
from reid.workflows.gpu_check.sizes import Sizes

__all__ = [
    "Amp", "Batch", "CompileMode", "Criterion", "Embeddings", "Hook", "Precision", "ReIDModel",
    "Trainer",
]  # fmt: skip

DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TMGF_LOSS: Mapping[str, Any] = {"name": "O2CAPLoss"}
CAMERAS = 15
_PROXIES_PER_CLUSTER = 4
_IMAGES_PER_PROXY = 4
_REGISTERING = ("backbones", "vit", "osnet", "heads", "losses", "memory_losses")


def import_parts() -> None:
    """Registers the networks, heads and losses of the core and the projects by importing them.

    Parts that need a missing package are not registered.
    """
    for name in _REGISTERING:
        _import(f"reid.modeling.{name}")
    if find_spec("numba") is None:
        folder = Path(reid.__file__).parent / "labelling"
        for name in ("reid.labelling", *(f"reid.labelling.{f.stem}" for f in folder.glob("*.py"))):
            sys.modules.setdefault(name, _NoClusterers(name))
    for module in pkgutil.iter_modules(reid.projects.__path__):
        if module.ispkg:
            _import(f"reid.projects.{module.name}")


class _NoClusterers(ModuleType):
    """Replaces `reid.labelling`, which needs numba.

    Projects contain clusterers beside networks and losses. With this, networks and losses can be
    imported without numba.
    """

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__doc__": "Cannot be used: numba is missing."})


def _import(name: str) -> bool:
    """Imports a module if it can be found; returns whether it was imported.

    Raises:
        ModuleNotFoundError: A module of this project is missing, which is a bug.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        lacking = error.name or ""
        if lacking.split(".")[0] == "reid" and not name.startswith(lacking):
            raise
        return False
    return True


def make_network(
    sizes: Sizes,
    device: torch.device,
    *,
    depth: int = 0,
    drop_path: float = 0.1,
    seed: int = 0,
) -> ReIDModel:
    """TMGF's network with random weights, the same for the same seed on any device.

    Args:
        sizes: Sizes of images and layers.
        device: The network's device.
        depth: Number of layers; 0: the number in `sizes`.
        drop_path: Rate of stochastic depth; use 0 to compare runs with different random numbers.
        seed: Seed of the weights.
    """
    options = {
        "name": "IBNViT", "embed_dim": sizes.dim, "depth": depth or sizes.depth,
        "num_heads": sizes.heads, "stem_channels": sizes.stem, "drop_path": drop_path,
    }  # fmt: skip
    return _put_together(options, {"name": "TMGFHead"}, sizes.image, device, seed)


def make_other_network(
    backbone: Mapping[str, Any], image: tuple[int, int], device: torch.device
) -> ReIDModel:
    """Builds a network with one global feature from the options of its backbone."""
    return _put_together(backbone, {"name": "BNNeckHead"}, image, device, 0)


def has_backbone(name: str) -> bool:
    """Whether a backbone of this name is registered."""
    return name in BACKBONE


def _put_together(
    backbone: Mapping[str, Any],
    head: Mapping[str, Any],
    image: tuple[int, int],
    device: torch.device,
    seed: int,
) -> ReIDModel:
    torch.manual_seed(seed)
    made = build(
        BACKBONE, backbone, "gpu_check.backbone",
        image_size=image, num_cameras=CAMERAS, unseen_cameras=(),
    )  # fmt: skip
    return ReIDModel(made, build(HEAD, head, "gpu_check.head", backbone=made)).to(device)


def compiled(network: nn.Module, mode: CompileMode) -> None:
    """Makes the network compile on its next call."""
    compile_network(network, mode)


def share_statistics(network: nn.Module) -> None:
    """Lets BatchNorm take its statistics over the batches of all processes."""
    group_batch_norms(network, 0)


def forward(network: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32) -> Embeddings:
    """The network's output for a batch, in mixed precision if `dtype` is not float32."""
    with torch.autocast(batch.image.device.type, dtype, enabled=dtype is not torch.float32):
        embeddings: Embeddings = network(batch)
    return embeddings


def banks_of(embeddings: Embeddings) -> Tensor:
    """Unit features (1 + K, B, D), the global ones first."""
    return embeddings.unit.transpose(0, 1)


def embeddings_of(banks: Tensor) -> Embeddings:
    """Embeddings with given unit features (1 + K, B, D)."""
    unit = banks.transpose(0, 1)
    return Embeddings(unit, unit, unit, unit[:, 0])


@dataclass(frozen=True)
class Labelled:
    """Images with labels: each image is one proxy, and four proxies make a cluster.

    Attributes:
        labels: Labels of the P images.
        banks: (1 + K, P, D) unit features; the four of a cluster are near each other.
        camids: (P,) cameras.
        image_of: (P,) the image of each proxy.
    """

    labels: PseudoLabels
    banks: Tensor
    camids: Tensor
    image_of: Tensor

    @property
    def features(self) -> FeatureSet:
        """The features in the form that the criterion takes."""
        unit = self.banks.transpose(0, 1)
        return FeatureSet.of(self.banks[0], camids=self.camids, unit=unit)


def make_labelled(rows: int, banks: int, dim: int, device: torch.device) -> Labelled:
    """Makes P = `rows` labelled images, the same on any device."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(rows) // _PROXIES_PER_CLUSTER
    camids = (cluster * 7 + torch.arange(rows) % _PROXIES_PER_CLUSTER) % CAMERAS
    labels = PseudoLabels.from_clusters(cluster, camids)
    features = torch.randn(banks, rows, dim, generator=generator)
    features += torch.randn(banks, int(cluster.max()) + 1, dim, generator=generator)[:, cluster]
    image_of = torch.empty_like(labels.proxy)
    image_of[labels.proxy] = torch.arange(rows)
    unit = F.normalize(features, dim=2).to(device)
    return Labelled(labels.to(device), unit, camids.to(device), image_of.to(device))


def make_criterion(
    specs: Sequence[Mapping[str, Any]], network: Any, labelled: Labelled, device: torch.device
) -> Criterion:
    """Builds losses with labels, at an epoch in which all of them are active.

    Args:
        specs: Specs as in a config, without weights.
        network: Gives `embed_dim` and `num_parts`.
        labelled: The images.
        device: The device of the losses.

    Raises:
        ConfigError: A loss needs a fact that this check does not provide.
    """
    losses: list[Loss] = [
        build(
            LOSS, dict(spec), "gpu_check.criterion",
            embed_dim=network.embed_dim, num_parts=network.num_parts,
            num_classes=labelled.labels.num_clusters,
        )
        for spec in specs
    ]  # fmt: skip
    criterion = Criterion(losses).to(device)
    relabel(criterion, labelled.labels, labelled.features, epoch=100)
    return criterion.train()


def relabel(
    criterion: nn.Module, labels: PseudoLabels, features: FeatureSet, *, epoch: int
) -> None:
    """Gives the labels of an epoch to the losses, which fill their memories."""
    assert isinstance(criterion, Criterion)
    criterion.set_epoch(epoch)
    criterion.set_labels(labels, features)


def loss_specs() -> list[dict[str, Any]]:
    """Specs of every registered loss with default options, and of some with other options."""
    specs: list[dict[str, Any]] = [{"name": name} for name in sorted(name for name, _ in LOSS)]
    specs.append({"name": "ClusterContrastLoss", "update": "hard"})
    specs.append({"name": "O2CAPLoss", "average": "camera"})
    specs.append({"name": "Triplet", "margin": 0.3, "normalize": True})
    return [spec for spec in specs if spec["name"] in LOSS]


def losses(criterion: nn.Module, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
    """The losses of a batch, by name."""
    values: dict[str, Tensor] = criterion({STUDENT: embeddings}, batch)
    return values


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of named losses."""
    return torch.stack([*losses.values()]).sum()


def backward(value: Tensor) -> None:
    """The gradients of a number."""
    value.backward()  # type: ignore[no-untyped-call]


def finish_step(criterion: nn.Module, embeddings: Embeddings, batch: Batch) -> None:
    """Updates the memories after the optimizer's step."""
    assert isinstance(criterion, Criterion)
    criterion.commit({STUDENT: embeddings.map(Tensor.detach)}, batch)


def memories(criterion: nn.Module) -> dict[str, Tensor]:
    """The rows of the memories by name."""
    return {name: rows for name, rows in criterion.named_buffers() if name.endswith("rows")}


def overflow_next(criterion: Criterion, factor: float) -> None:
    """Multiplies the losses, so that their scaled gradient may become infinite; 1 = unchanged."""
    criterion.weights = (factor,) * len(criterion.weights)


def make_batch(
    labelled: Labelled,
    count: int,
    image: tuple[int, int],
    device: torch.device,
    seed: int = 0,
) -> Batch:
    """Random images of some proxies, four of each, the same for the same seed on any device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    proxies = len(labelled.image_of)
    chosen = torch.randperm(proxies, generator=generator)[: -(-count // _IMAGES_PER_PROXY)]
    chosen = chosen.repeat_interleave(_IMAGES_PER_PROXY)[:count].to(labelled.image_of.device)
    index = labelled.image_of[chosen]
    pixels = torch.randn(len(index), 3, *image, generator=generator)
    return as_batch(pixels, labelled.camids[index], index).to(device, non_blocking=False)


def as_batch(image: Tensor, camid: Tensor, index: Tensor) -> Batch:
    """A batch of images (B, 3, H, W) of cameras (B,) that are rows (B,) of their set."""
    return Batch.of(image, camid, index)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies without blocking the host."""
    return batch.map(Tensor.pin_memory)


def share_of(batch: Batch, rank: int, world: int) -> Batch:
    """The images of a batch that process `rank` of `world` takes."""
    count = len(batch.index)
    share = slice(rank * count // world, (rank + 1) * count // world)
    return batch.map(lambda column: column[share])


def near_features(labelled: Labelled, batch: Batch) -> Tensor:
    """Unit features (1 + K, B, D) near those of the batch's images, the same on any device."""
    generator = torch.Generator().manual_seed(2000)
    own = labelled.banks[:, batch.index].cpu()
    noise = torch.randn(own.shape, generator=generator, dtype=own.dtype)
    return F.normalize(own + 0.05 * noise, dim=2).to(labelled.banks.device)


def image_records(labelled: Labelled) -> list[ImageRecord]:
    """Records of the images, whose files do not exist."""
    return [
        ImageRecord(f"image_{number}.jpg", camid=camid)
        for number, camid in enumerate(labelled.camids.tolist())
    ]


def extract(
    network: nn.Module,
    batches: Any,
    records: Sequence[ImageRecord],
    device: torch.device,
    precision: Precision = "fp32",
) -> FeatureSet:
    """Features of the records, from batches that hold each of them."""
    return extract_features(network, batches, records, device, precision=precision)


def compared(features: FeatureSet) -> Tensor:
    """(N, D) what is compared in tests."""
    return features.test


class FixedBatches:
    """A loader of given batches, in an order that depends on the epoch.

    Attributes:
        batch_sampler: The loader itself, since it takes the epoch.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._epoch = 0
        self.batch_sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._epoch)
        for number in torch.randperm(len(self._batches), generator=generator).tolist():
            yield self._batches[number]


def make_trainer(
    network: nn.Module,
    criterion: nn.Module,
    device: torch.device,
    *,
    amp: Amp = "off",
    lr: float = 3.5e-4,
    clip: float = 0.0,
    epochs: int = 1,
    loader: Any = (),
    hooks: Sequence[Hook] = (),
) -> Trainer:
    """Builds a trainer with TMGF's optimizer, ready to take steps."""
    network.train()
    criterion.train()
    optimizer = build_optimizer(
        [*network.named_parameters(), *criterion.named_parameters()],
        "SGD", lr=lr, momentum=0.9, weight_decay=5e-4,
    )  # fmt: skip
    rate = LearningRate(lr, epochs)
    optimization = Optimization(optimizer, rate, device, amp=amp, clip_grad_norm=clip)
    assert isinstance(criterion, Criterion)
    return Trainer(
        network, criterion, optimization, cast(Any, loader), max_epochs=epochs, device=device,
        hooks=hooks, nonfinite=NonFiniteLosses("stop"),
    )  # fmt: skip


def watch_step(trainer: Trainer, lap: Any) -> list[Any]:
    """Calls `lap` at the end of each part of every step; returns handles with `remove`."""
    return [
        trainer.model.register_forward_pre_hook(lambda *_: lap("other")),
        trainer.model.register_forward_hook(lambda *_: lap("forward")),
        trainer.criterion.register_forward_hook(lambda *_: lap("losses")),
        trainer.optimization.optimizer.register_step_pre_hook(lambda *_: lap("backward")),
        trainer.optimization.optimizer.register_step_post_hook(lambda *_: lap("optimizer")),
    ]


def loss_of(trainer: Trainer) -> float:
    """The sum of the last step's losses."""
    return float(trainer.losses["loss"])


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that a step changes: weights, statistics, memories, the optimizer's state."""
    found = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    found |= {f"criterion.{name}": value for name, value in trainer.criterion.named_buffers()}
    for number, state in enumerate(trainer.optimization.optimizer.state.values()):
        found |= {
            f"optimizer.{number}.{name}": value
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
    return {name: value.detach().clone() for name, value in found.items()}
