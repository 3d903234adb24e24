#!/usr/bin/env python
"""Times TMGF's ViT, in extraction or in a training step, against its equations in plain PyTorch.

The baseline is `PlainViT`: attention as softmax(q k^T) v, nothing fused, in fp32. Images are
random and already on the device.

Floor: the matrix products, convolutions and attentions of the same step, each run alone, in turns
with both sides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from floors import Floor, Products, clock, same_threads
from measure import report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reid.modeling.compiling import compile_network
from reid.modeling.ibn import IBN
from reid.modeling.vit import ViT
from reid.solver import build_optimizer
from reid.structures import Batch

MODELS: dict[str, dict[str, Any]] = {
    "vit_small": {"image_size": (384, 128), "embed_dim": 384, "depth": 12, "num_heads": 6},
    "demo": {
        "image_size": (96, 48), "embed_dim": 96, "depth": 5, "num_heads": 3, "stem_channels": 32,
    },
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAMERAS = 15


class PlainViT(nn.Module):
    """The class token's unit vector, computed step by step with the weights of a `ViT`."""

    def __init__(self, network: ViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Images and cameras -> (B, D)."""
        net, camera = self.network.net, self.network.camera_embed
        assert camera is not None
        patches = self._embed(net.patch_embed, batch.image)
        x = torch.cat((net.cls_token.expand(len(patches), -1, -1), patches), 1)
        x = x + net.pos_embed + 3 * camera[batch.camid]
        for block in net.blocks:
            x = x + self._attend(block.attn, block.norm1(x))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return F.normalize(net.norm(x)[:, 0])

    @staticmethod
    def _embed(stem: Any, image: Tensor) -> Tensor:
        x = image
        for layer in stem.conv:
            if isinstance(layer, IBN):
                first, second = x.chunk(2, 1)
                x = torch.cat((layer.IN(first.contiguous()), layer.BN(second.contiguous())), 1)
            else:
                x = layer(x)
        return cast(Tensor, stem.proj(x).flatten(2).transpose(1, 2))

    @staticmethod
    def _attend(attention: Any, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = attention.qkv(x).reshape(batch, count, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)
        mixed: Tensor = attention.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))
        return mixed


class Unit(nn.Module):
    """This project's network, with the same output."""

    def __init__(self, network: ViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Images and cameras -> (B, D)."""
        return F.normalize(self.network(batch).tokens[:, 0].float())


def make_network(name: str, device: torch.device) -> ViT:
    """Builds the ViT with fixed weights, without stochastic depth, so that both sides are equal."""
    torch.manual_seed(0)
    network = ViT(
        num_cameras=CAMERAS, stem="ibn", camera_embedding=True, drop_path=0.0, **MODELS[name]
    )
    return network.to(device)


def extraction(
    model: nn.Module, image: Tensor, camid: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Returns a function that extracts features."""
    model.eval()

    @torch.inference_mode()
    def work() -> Tensor:
        with torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32):
            return cast(Tensor, model(Batch.of(image, camid)))

    return work


def training(
    model: nn.Module, image: Tensor, camid: Tensor, dtype: torch.dtype, optimizer: Any
) -> Callable[[], Tensor]:
    """Returns a function that takes a step towards equal features and gives the features before."""
    model.train()

    def work() -> Tensor:
        with torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32):
            features = cast(Tensor, model(Batch.of(image, camid)))
        (features * features.detach().roll(1, 0)).sum().mul(-1 / len(features)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return features.detach()

    return work


def seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Measures one call, by the clock of `floors`."""
    start = clock(device.type)
    work()
    return clock(device.type) - start


def main() -> None:
    """Parses the arguments, calls both sides in turn, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*MODELS], default="vit_small")
    parser.add_argument("--stage", choices=["extraction", "training"], default="extraction")
    parser.add_argument("--batch", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--precision", choices=[*DTYPES], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile (MODEL.COMPILE)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="if it takes too long")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="T",
        help="the device's peak at this precision, for FLOP utilisation",
    )  # fmt: skip
    arguments = parser.parse_args()
    same_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = MODELS[arguments.model]["image_size"]
    image = torch.randn(arguments.batch, 3, *size, device=device)
    camid = torch.arange(arguments.batch, device=device) % CAMERAS
    ours, plain = Unit(make_network(arguments.model, device)), make_network(arguments.model, device)
    sides: dict[str, tuple[nn.Module, torch.dtype]] = {"ours": (ours, DTYPES[arguments.precision])}
    if not arguments.no_baseline:
        sides["baseline"] = (PlainViT(plain), torch.float32)
    works = {}
    for side, (model, dtype) in sides.items():
        if arguments.stage == "extraction":
            works[side] = extraction(model, image, camid, dtype)
        else:
            kind: Any = "AdamW"
            optimizer: Any = (
                build_optimizer([*model.named_parameters()], kind, lr=1e-5, weight_decay=0.0)
                if side == "ours"
                else torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False, fused=False)
            )
            works[side] = training(model, image, camid, dtype, optimizer)
    products = Products(device.type)
    with FlopCounterMode(display=False) as counter:
        first = works["ours"]()
    with products:
        works["ours"]()
    if arguments.compile:
        compile_network(ours.network)
    agrees, cosine = None, None
    if not arguments.no_baseline:
        other = works["baseline"]()
        cosine = float((first * other).sum(1).min())
        close = float((first - other).abs().max()) < 1e-6
        agrees = close if arguments.precision == "fp32" else cosine > 0.9999
    times: dict[str, list[float]] = {side: [] for side in works}
    alone: list[float] = []
    for number in range(arguments.rounds + 1):
        for side, work in works.items():
            taken = seconds(work, device)
            if number:  # the first round warms up
                times[side].append(taken)
        least = products.once()
        if number:
            alone.append(least)
    typical = {side: statistics.median(values) for side, values in times.items()}
    floor = Floor({"products": statistics.median(alone)}, typical["ours"])
    rate, flops = arguments.batch / typical["ours"], counter.get_total_flops()
    tflops = flops / typical["ours"] / 1e12
    used = tflops / arguments.peak_tflops if arguments.peak_tflops else None
    sys.stdout.write(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}: {rate:.1f} images/s, "
        f"{tflops:.3g} TFLOP/s" + (f", {used:.1%} of the peak\n" if used else "\n")
    )
    report(
        f"backbone {arguments.stage}",
        f"{arguments.model} {size[0]}x{size[1]}, batch {arguments.batch}, {arguments.precision}"
        + (", compiled" if arguments.compile else ""),
        (typical["ours"], None),
        (typical["baseline"], None) if "baseline" in typical else None,
        agrees, floor, images_per_second=round(rate, 1), tflops=round(tflops, 4), utilisation=used,
        cosine=cosine,
    )  # fmt: skip


if __name__ == "__main__":
    main()
