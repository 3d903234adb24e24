"""Any timm model as a backbone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from reid.modeling.attention import Attention, put_attention
from reid.modeling.ibn import put_ibn
from reid.registry import BACKBONE, nearest
from reid.structures import Batch, FeatureTokens

_NO_OPTIONS = {
    "features_only", "in_chans", *inspect.signature(timm.create_model).parameters,  # paths of files
}  # fmt: skip


@BACKBONE.register()
class TimmBackbone(nn.Module):
    """A timm model by name; it ignores the camera of an image.

    The token of the whole image is the pooled map of a convolutional network, the class token of a
    transformer, or the mean of its tokens if it has no class token.

    Args:
        model: timm's name, e.g. `resnet50`, `vit_small_patch16_224`.
        image_size: (H, W) in pixels.
        pretrained: Load timm's own weights, which needs the network once.
        pool: Pooling of a convolutional map: `avg`, `max`, or `gem`, the generalised mean with a
            learnable exponent (Radenovic et al., TPAMI 2019).
        last_stride: 1 keeps the resolution in a ResNet's last stage (Luo et al., CVPRW 2019);
            its convolutions are not dilated.
        drop_path: Rate of stochastic depth.
        norm: `ibn` makes a ResNet an IBN-ResNet-a (Pan et al., ECCV 2018). timm has no weights for
            it: set MODEL.BACKBONE_WEIGHTS to those of IBN-Net, whose names fit.
        stem_activation: False leaves out the activation after a ResNet's first BatchNorm, as CAP's
            code does.
        mirror: In evaluation, give the mean of the features of an image and of its mirror image,
            whose map is mirrored back.
        attention: What stages attend to at their end, by their names, such as `{layer1: channels}`;
            see `reid.modeling.attention`. Pre-trained weights need not have it.
        options: timm's own arguments of the model, e.g. `{channels: [16, 32, 64, 128]}` for a
            narrow ResNet.

    Raises:
        ValueError: timm does not know the model, an option does not fit it, its weights cannot be
            downloaded, or its features are not a map or tokens.
    """

    may_be_new = ("net.*.attention.*",)

    def __init__(
        self,
        model: str,
        image_size: tuple[int, int],
        pretrained: bool = False,
        pool: Literal["avg", "max", "gem"] = "avg",
        last_stride: Literal[1, 2] = 2,
        drop_path: float = 0.0,
        norm: Literal["batch", "ibn"] = "batch",
        stem_activation: bool = True,
        mirror: bool = False,
        attention: Mapping[str, Attention] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if norm == "ibn" and pretrained:
            raise ValueError(
                "pretrained: timm has no weights of IBN networks; set MODEL.BACKBONE_WEIGHTS to a "
                "checkpoint of IBN-Net"
            )
        name = model.split(".")[0]
        if not timm.is_model(name):
            raise ValueError(f"model: timm has no {model!r}{nearest(name, timm.list_models())}")
        arguments: dict[str, Any] = {"num_classes": 0}
        preset = timm.get_pretrained_cfg(name)
        if preset is not None and preset.fixed_input_size:
            arguments["img_size"] = image_size
        if drop_path:
            arguments["drop_path_rate"] = drop_path
        if last_stride == 1:
            arguments["output_stride"] = 16
        for option, value in (options or {}).items():
            if option in _NO_OPTIONS or option in arguments:
                raise ValueError(f"options: {option} is not the model's, or set by this backbone")
            arguments[option] = value
        net: Any = _create(model, pretrained, arguments, options or {})
        if last_stride == 1:
            _undo_dilation(net)
        if norm == "ibn":
            put_ibn(net)
        if not stem_activation:
            if not hasattr(net, "act1"):
                raise ValueError(f"stem_activation: {model!r} has none to leave out")
            net.act1 = nn.Identity()
        put_attention(net, attention or {})
        self.embed_dim = int(net.num_features)
        self.net: nn.Module = net
        self._pool = pool
        self._mirror = mirror
        if pool == "gem":
            self.exponent = nn.Parameter(torch.tensor(3.0))

    def split_last_stage(self) -> nn.Module:
        """Removes a ResNet's last stage and returns it, for a head that uses it.

        `embed_dim` is then the one of the stage before.

        Raises:
            ValueError: The network is no ResNet of timm, or its pooling is learned.
        """
        net: Any = self.net
        stage = getattr(net, "layer4", None)
        if not (isinstance(stage, nn.Sequential) and stage and hasattr(stage[0], "conv1")):
            raise ValueError(f"expected a ResNet of timm, got {type(net).__name__}")
        if self._pool == "gem":
            raise ValueError("pool: expected avg or max, as the map is not pooled; got gem")
        block: Any = stage[0]
        self.embed_dim = int(block.conv1.in_channels)
        net.layer4 = nn.Sequential()  # without layers, it passes its input on
        return stage

    def forward(self, batch: Batch) -> FeatureTokens:
        """Tokens of the batch's images."""
        tokens, (height, width) = self._tokens_of(batch.image)
        if self._mirror and not self.training:
            mirrored, _ = self._tokens_of(batch.image.flip(3))
            grid = mirrored[:, 1:].reshape(len(mirrored), height, width, -1).flip(2).flatten(1, 2)
            tokens = (tokens + torch.cat((mirrored[:, :1], grid), 1)) / 2
        return FeatureTokens(tokens, (height, width))

    def _tokens_of(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens (B, 1 + h*w, D), and (h, w)."""
        net: Any = self.net
        features = net.forward_features(image)
        if features.ndim == 3:
            prefix = int(getattr(self.net, "num_prefix_tokens", 0))
            patches = features[:, prefix:]
            whole = features[:, :1] if prefix else patches.mean(1, keepdim=True)
            return torch.cat((whole, patches), 1), self._grid(patches.shape[1], image)
        if features.ndim != 4:
            raise ValueError(
                f"expected a map or tokens, got features of shape {tuple(features.shape)}"
            )
        if features.shape[1] != self.embed_dim:  # channels last, as in Swin
            features = features.permute(0, 3, 1, 2)
        patches = features.flatten(2).transpose(1, 2)
        grid = features.shape[2], features.shape[3]
        return torch.cat((self._pooled(features)[:, None], patches), 1), grid

    def _pooled(self, features: Tensor) -> Tensor:
        if self._pool == "max":
            return features.amax((2, 3))
        if self._pool == "gem":
            powers = features.float().clamp(min=1e-6).pow(self.exponent)
            return powers.mean((2, 3)).pow(1 / self.exponent)
        return features.mean((2, 3))

    def _grid(self, count: int, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[2:]
        rows = round(math.sqrt(count * height / width))
        if rows == 0 or count % rows:
            raise ValueError(f"{count} tokens of a {height} x {width} image make no grid")
        return rows, count // rows


def _create(
    model: str, pretrained: bool, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> nn.Module:
    """Timm's network.

    Raises:
        ValueError: See `TimmBackbone`.
    """
    try:
        return timm.create_model(model, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"model: {model!r} does not take an option: {error}") from error
    except Exception as error:  # timm checks few options, and each in another way
        if pretrained and str(error).startswith("Error(s) in loading state_dict"):
            raise ValueError(
                f"pretrained: timm's weights of {model!r} do not fit a network with the options "
                f"{dict(options)}; set PRETRAINED false, or leave out options that change its size"
            ) from error
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise ValueError(
                f"pretrained: timm's weights of {model!r} cannot be downloaded ({error}); get them "
                "elsewhere and set MODEL.BACKBONE_WEIGHTS to the file"
            ) from error
        if not options:
            raise
        reason = " ".join(str(error).split()) or "timm does not say why"
        raise ValueError(
            f"options: {model!r} cannot be made with {dict(options)} "
            f"({type(error).__name__}: {reason:.200})"
        ) from error


def _undo_dilation(net: nn.Module) -> None:
    """Removes the dilation that timm puts in place of a stride; the baselines have none."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = (1, 1)
            module.padding = tuple(side // 2 for side in module.kernel_size)
