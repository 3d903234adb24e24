"""PFD's head: body parts, poses and learned views of a person, sorted by what can be seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.heads import Neck, normalize
from reid.modeling.vit import ViT
from reid.projects.pfd.decoder import Decoder
from reid.projects.pfd.matching import Slots, fill_slots, split_slots
from reid.projects.pfd.pose import HEATMAP, JOINTS, PoseEstimator
from reid.registry import HEAD, ConfigError, Range
from reid.structures import Batch, Embeddings, FeatureTokens

_K = len(JOINTS)
_Count: TypeAlias = Annotated[int, Range(1, 16_384)]
_Share: TypeAlias = Annotated[float, Range(0, 1, below=True)]


@HEAD.register()
class PFDHead(nn.Module):
    """Features of 17 parts guided by heatmaps of 17 joints, and of 17 learned views.

    Wang et al., AAAI 2022, as published code has it. With the tokens x before the last layer and
    the heatmaps T, as 17 rows of P numbers:

    - Parts: the N patches are cut in their order into 17 groups of floor(N / 17), the last takes
      the rest; s_i is the class token of a group after the last layer and the norm.
    - Global: w is the mean of T over the joints, averaged from P to D numbers; G is the neck's
      result of x_0 w + x_0. The class token does not pass the last layer.
    - Views: `Decoder` of the tokens x w. Poses: t_j is a linear layer's result of T_j.
    - Slots: `fill_slots` and `split_slots`. A joint is hidden if its heatmap's peak is below
      `hidden_below`. The mean of the visible slots passes a neck, that of the hidden ones another.

    The banks are G and s_i, 1 + 17. `Embeddings.aux` has the banks of the slots for `PFDLoss`:
    `slots_pre` and `slots_post` (B, 1 + 17, D), and `hidden` (B, D). The test feature has 36 D
    numbers: [G; s_i / 17 after their necks; the visible mean after its neck; the visible slots
    / 17, then zeros], normalised.

    The last layer moves from the backbone to the head, so load pre-trained weights into the
    backbone first. There are more than ten arguments since each is an option of the config.

    Args:
        backbone: A ViT, such as the core's, with 17 patches or more.
        pose: Finds the joints in each batch; None: the batch has heatmaps, see `PoseHeatmaps`.
        heatmap_size: (h, w) of the heatmaps; None: a quarter of the image's sides.
        hidden_below: Smallest peak of a visible joint.
        decoder_layers: Layers of the decoder.
        decoder_heads: Its attention heads.
        decoder_width: Width of its hidden layers.
        dropout: In the decoder.
        residual: The decoder's layers keep their input beside the result of the small network,
            which the published code loses.
        own_part: See `fill_slots`.

    Attributes:
        embed_dim: D.
        num_parts: K = 17.

    Raises:
        ValueError: The backbone is no ViT or has too few patches, or D is no multiple of
            `decoder_heads`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pose: PoseEstimator | None = None,
        heatmap_size: tuple[_Count, _Count] | None = None,
        hidden_below: Annotated[float, Range(0, 1000)] = 0.3,
        decoder_layers: Annotated[int, Range(1, 1000)] = 6,
        decoder_heads: _Count = 8,
        decoder_width: _Count = 2048,
        dropout: _Share = 0.1,
        residual: bool = False,
        own_part: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, ViT):
            raise ValueError(f"backbone: expected a ViT, got {type(backbone).__name__}")
        count = backbone.grid[0] * backbone.grid[1]
        if count < _K:
            raise ValueError(
                f"backbone: expected {_K} patches or more, one for each part, got {count}; a "
                "larger image or a smaller patch_stride gives more"
            )
        dim = backbone.embed_dim
        if dim % decoder_heads:
            raise ValueError(f"decoder_heads: expected a divisor of {dim}, got {decoder_heads}")
        height, width = backbone.image_size
        self.embed_dim = dim
        self.num_parts = _K
        self.heatmap_size = heatmap_size or (height // 4, width // 4)
        self._pose = () if pose is None else (pose,)  # no part of the network, if it is a module
        self._hidden_below = hidden_below
        self._own_part = own_part
        self._share = count // _K  # patches of a part
        self.local = nn.Sequential(*backbone.split_last_layer())
        self.neck, self.visible_neck, self.hidden_neck = (Neck(dim) for _ in range(3))
        self.part_necks = nn.ModuleList(Neck(dim) for _ in range(_K))
        self.slot_necks = nn.ModuleList(Neck(dim) for _ in range(_K))
        self.pose_projection = nn.Linear(self.heatmap_size[0] * self.heatmap_size[1], dim)
        self.decoder = Decoder(
            _K, dim, decoder_layers, decoder_heads, decoder_width, dropout, residual
        )

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + 17, D); the test feature has 36 D numbers.

        Raises:
            ConfigError: There are no heatmaps, or they have another shape.
        """
        tokens = features.tokens
        heatmap = self._heatmaps(batch)
        weight = F.adaptive_avg_pool1d(heatmap.mean(1), self.embed_dim)[:, None]
        parts = self._parts(tokens)
        slots = self.slots(parts, tokens * weight, heatmap)
        visible, hidden, listed = split_slots(slots)
        first = self.neck(tokens[:, 0] * weight[:, 0] + tokens[:, 0])
        seen = self.visible_neck(visible)
        pre = torch.cat((first[:, None], parts), 1)
        post = torch.cat((first[:, None], _each(self.part_necks, parts)), 1)
        slots_pre = torch.cat((seen[:, None], listed), 1)
        slots_post = torch.cat((seen[:, None], _each(self.slot_necks, listed)), 1)
        scale = post.new_full((1 + _K, 1), 1 / _K)
        scale[0] = 1
        test = normalize(torch.cat((post * scale, slots_pre * scale), 1).flatten(1))
        aux = {"slots_pre": slots_pre, "slots_post": slots_post, "hidden": self.hidden_neck(hidden)}
        return Embeddings(pre, post, normalize(post), test, aux)

    def slots(self, parts: Tensor, memory: Tensor, heatmap: Tensor) -> Slots:
        """The slots of parts (B, 17, D), weighted tokens (B, 1 + N, D) and heatmaps (B, 17, P)."""
        pose = self.pose_projection(heatmap).float()
        hidden_joints = heatmap.amax(2) < self._hidden_below
        views = self.decoder(memory).float()
        with torch.autocast(parts.device.type, enabled=False):
            return fill_slots(parts, pose, views, hidden_joints, own_part=self._own_part)

    def _heatmaps(self, batch: Batch) -> Tensor:
        """Heatmaps (B, 17, P) in float32 of the batch's images.

        Raises:
            ConfigError: There are none, or they have another shape.
        """
        if self._pose:
            with torch.no_grad():
                heatmap = self._pose[0](batch.image)
        elif HEATMAP in batch.side:
            heatmap = batch.side[HEATMAP]
        else:
            raise ConfigError(
                "model.head (PFDHead): these images have no heatmaps. For the images of data sets, "
                "INPUT.MAPS: [{NAME: PoseHeatmaps}] reads them from files; for any other picture, "
                "MODEL.HEAD.POSE must name an estimator (projects/PFD/README.md)"
            )
        expected = (len(batch.image), _K, *self.heatmap_size)
        shape = tuple(heatmap.shape) if isinstance(heatmap, Tensor) else type(heatmap).__name__
        if shape != expected:
            raise ConfigError(
                f"model.head (PFDHead): expected heatmaps {expected}, got {shape}; "
                "MODEL.HEAD.HEATMAP_SIZE or the STRIDE of INPUT.MAPS sets another size"
            )
        return heatmap.flatten(2).float()

    def _parts(self, tokens: Tensor) -> Tensor:
        """The parts (B, 17, D) of the tokens (B, 1 + N, D) before the last layer."""
        size, dim = self._share, tokens.shape[2]
        even = tokens[:, 1 : 1 + (_K - 1) * size].reshape(-1, size, dim)
        first = tokens[:, :1].repeat_interleave(_K - 1, 0)
        groups = self.local(torch.cat((first, even), 1))[:, 0].reshape(-1, _K - 1, dim)
        rest = torch.cat((tokens[:, :1], tokens[:, 1 + (_K - 1) * size :]), 1)
        return torch.cat((groups, self.local(rest)[:, :1]), 1).float()


def _each(necks: Iterable[nn.Module], banks: Tensor) -> Tensor:
    """Each bank (B, K, D) after its own neck."""
    return torch.stack([neck(bank) for neck, bank in zip(necks, banks.unbind(1), strict=True)], 1)
