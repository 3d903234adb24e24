"""The jigsaw patch module: local features of groups of shuffled patches."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from reid.modeling.heads import Neck, normalize
from reid.modeling.vit import ViT
from reid.registry import HEAD, Range
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class JPMHead(nn.Module):
    """The class token of the whole image, and one for each group of shuffled patches.

    TransReID, section 3.2. The patches before the last layer are re-ordered (`jigsaw_order`) and
    cut into K groups of floor(N / K). A second copy of the last layer and the last norm, one for
    all groups, sees each group with the class token before the last layer; its class tokens are the
    local features. The order is the same for all images, in training and in tests; nothing is
    random. The test feature is [global; local_1 / K; ...; local_K / K], (1 + K) D numbers, then
    normalised. Each feature has its own BatchNorm.

    The copy is made from the backbone's last layer, so load pre-trained weights into the backbone
    first.

    Args:
        backbone: A ViT, such as the core's.
        num_groups: K.
        shift: m; the first m - 1 patches move to the end before the shuffle.
        shuffle_groups: g; a group takes patches of g bands of the image. It divides the N patches,
            or N + 1.
        rearrange: Shuffle the patches; otherwise a group is a horizontal band.
        neck_feature: Memories and tests take features from `before` the necks (as published) or
            `after` them.

    Attributes:
        embed_dim: D.
        num_parts: K.

    Raises:
        ValueError: The backbone is no ViT, or an option does not fit its patches.
    """

    order: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_groups: Annotated[int, Range(1, 1024)] = 4,
        shift: Annotated[int, Range(1, 1_000_000)] = 5,
        shuffle_groups: Annotated[int, Range(1, 1_000_000)] = 2,
        rearrange: bool = True,
        neck_feature: Literal["before", "after"] = "before",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, ViT):
            raise ValueError(f"backbone: expected a ViT, got {type(backbone).__name__}")
        count = backbone.grid[0] * backbone.grid[1]
        if not 1 <= num_groups <= count:
            raise ValueError(
                f"num_groups: expected 1 to {count}, the backbone's patches, got {num_groups}"
            )
        order = jigsaw_order(count, shift, shuffle_groups) if rearrange else torch.arange(count)
        size = count // num_groups
        self.register_buffer("order", order[: size * num_groups], persistent=False)
        self.embed_dim = backbone.embed_dim
        self.num_parts = num_groups
        self._neck_feature = neck_feature
        block, norm = backbone.net.blocks[-1], backbone.net.norm
        self.local = nn.Sequential(copy.deepcopy(block), copy.deepcopy(norm))
        self.neck = Neck(self.embed_dim)
        self.part_necks = nn.ModuleList(Neck(self.embed_dim) for _ in range(num_groups))

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D); the test feature has (1 + K) D numbers.

        Raises:
            ValueError: The backbone does not give its tokens before the last layer.
        """
        if features.before is None:
            raise ValueError("expected the tokens before the last layer, the backbone gives none")
        pre = [features.tokens[:, 0], *self._local_features(features.before)]
        necks = (self.neck, *self.part_necks)
        post = torch.stack([neck(bank) for neck, bank in zip(necks, pre, strict=True)], 1)
        raw = torch.stack(pre, 1).float()
        compared = post if self._neck_feature == "after" else raw
        weights = compared.new_full((1 + self.num_parts, 1), 1 / self.num_parts)
        weights[0] = 1
        test = normalize((compared * weights).flatten(1))
        return Embeddings(raw, post, normalize(compared), test)

    def _local_features(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """K local features (B, D) of the tokens before the last layer, in one pass."""
        batch, _, dim = tokens.shape
        groups = tokens[:, 1:][:, self.order].reshape(batch * self.num_parts, -1, dim)
        first = tokens[:, :1].repeat_interleave(self.num_parts, 0)
        found: Tensor = self.local(torch.cat((first, groups), 1))[:, 0]
        return found.reshape(batch, self.num_parts, dim).unbind(1)


def jigsaw_order(count: int, shift: int, groups: int) -> Tensor:
    """The patch at each place after the shift and the shuffle of TransReID's published code.

    The sequence starts with patch m - 1 and ends with the first m - 1 patches (so one fewer than m
    moves). If g does not divide it, its last but one patch comes once more at the end. With R rows
    of g, place i g + k then holds element k R + i.

    Args:
        count: N, patches of an image.
        shift: m, from 1 to N.
        groups: g.

    Returns:
        (N,) or (N + 1,) int64.

    Raises:
        ValueError: The shift is out of its range, or g divides neither N nor N + 1.
    """
    if not 1 <= shift <= count:
        raise ValueError(f"shift: expected 1 to {count}, the number of patches, got {shift}")
    repeats = count > 1 and not (count + 1) % max(groups, 1)
    if groups < 1 or (count % groups and not repeats):
        fitting = [g for g in range(1, min(count, 16) + 1) if not count % g or not (count + 1) % g]
        raise ValueError(
            f"shuffle_groups: expected a divisor of the {count} patches or of {count + 1}, such as "
            f"{', '.join(map(str, fitting))}; got {groups}"
        )
    sequence = torch.arange(count).roll(1 - shift)
    if count % groups:
        sequence = torch.cat((sequence, sequence[-2:-1]))
    return sequence.reshape(groups, -1).T.reshape(-1)
