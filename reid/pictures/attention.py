"""Attention rollout: how much of each patch reaches the token of the whole image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from reid.structures import Batch

Fusion = Literal["mean", "max", "min"]


def attention_rollout(attentions: Sequence[Tensor], fusion: Fusion = "mean") -> Tensor:
    """Attention through all layers (Abnar and Zuidema, *Quantifying Attention Flow*, ACL 2020).

    In every layer, heads are fused into A. A' = 0.5 A + 0.5 I, with rows scaled to sum to 1, stands
    for attention and residual connection. The rollout is A'_L ... A'_2 A'_1 (equation 1).

    Args:
        attentions: For each layer in order (B, heads, N, N), with rows that sum to 1.
        fusion: How heads are fused.

    Returns:
        (B, N, N): row i tells how much of each input token reaches token i; rows sum to 1.

    Raises:
        ValueError: There is no layer, or shapes do not fit.
    """
    if not attentions:
        raise ValueError("attentions: expected one layer or more, got none")
    shape = attentions[0].shape
    rollout = None
    for number, attention in enumerate(attentions):
        if attention.ndim != 4 or (attention.shape[0], *attention.shape[2:]) != (
            shape[0], shape[-1], shape[-1],
        ):  # fmt: skip
            raise ValueError(
                f"attentions[{number}]: expected ({shape[0]}, heads, {shape[-1]}, {shape[-1]}), "
                f"got {tuple(attention.shape)}"
            )
        attention = attention.float()
        if fusion == "mean":
            fused = attention.mean(1)
        else:
            fused = attention.amax(1) if fusion == "max" else attention.amin(1)
        mixed = 0.5 * fused + 0.5 * torch.eye(shape[-1], device=fused.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    return rollout


def attention_paths(model: Any) -> list[list[nn.Module]]:
    """The attention layers from the image to each output, in order.

    A head with `branches` has one path for each: the backbone's layers, then the branch's layers.

    Args:
        model: A model with `backbone` and `head`.

    Raises:
        ValueError: The model has no attention layers of timm.
    """
    shared = _attention_layers(model.backbone)
    branches = getattr(model.head, "branches", None)
    own = [_attention_layers(branch) for branch in branches] if branches is not None else [[]]
    paths = [[*shared, *layers] for layers in own]
    if not all(paths):
        raise ValueError(
            f"{type(model.backbone).__name__}: has no attention layers; rollout needs a ViT of timm"
        )
    return paths


@torch.no_grad()
def rollout_maps(model: Any, batch: Batch, fusion: Fusion = "mean") -> list[Tensor]:
    """How much of each patch reaches the class token, for each path through the model.

    The model runs unchanged, in eval mode; the attention weights are computed once more beside it,
    since fused attention does not return them.

    Args:
        model: Backbone and head; its mode is restored.
        batch: The images.
        fusion: How heads are fused.

    Returns:
        For each path (B, h, w): the share of each patch.

    Raises:
        ValueError: The model has no attention layers of timm, or further tokens beside class token
            and patches.
    """
    paths = attention_paths(model)
    layers = list(dict.fromkeys(layer for path in paths for layer in path))
    was_training = model.training
    model.eval()
    try:
        with _recording(layers) as weights:
            height, width = model.backbone(batch).grid
            weights.clear()
            model(batch)
    finally:
        model.train(was_training)
    maps = []
    for path in paths:
        reached = attention_rollout([weights[layer] for layer in path], fusion)[:, 0]
        if reached.shape[1] != 1 + height * width:
            raise ValueError(
                f"expected a class token and {height} x {width} patches, got {reached.shape[1]} "
                "tokens; rollout needs a ViT with a class token and no others"
            )
        maps.append(reached[:, 1:].reshape(-1, height, width))
    return maps


@contextmanager
def _recording(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Records the attention weights (B, heads, N, N) of these layers when they are called."""
    weights: dict[nn.Module, Tensor] = {}

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        tokens = inputs[0]
        batch, count, _ = tokens.shape
        qkv = layer.qkv(tokens).reshape(batch, count, 3, layer.num_heads, -1)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = layer.q_norm(query), layer.k_norm(key)
        weights[layer] = (layer.scale * query @ key.transpose(-2, -1)).softmax(-1)

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _attention_layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, Attention)]
