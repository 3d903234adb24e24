"""The whole, its stripes, and an embedding that is trained but not tested."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

from reid.modeling.heads import Neck, normalize, pool_stripes
from reid.registry import HEAD, Range
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class SelfSimilarityHead(nn.Module):
    """SSG's head: the raw means of the map and of its horizontal stripes, and an embedding.

    Fu et al., *Self-similarity Grouping* (ICCV 2019), as in the published code. `pre` holds the
    whole w, the upper half u and the lower half l; `unit` each of them normalised by itself. `post`
    holds the embedding e = ReLU(BatchNorm(W w)) in place of w, which losses may take; BatchNorm's
    bias is trained. `test` is L2(concat(w, u, l)), so the embedding is not tested.

    Args:
        backbone: Its `embed_dim` is D; the token of the whole image should be the mean of its map.
        num_stripes: K; see `pool_stripes`.
        mirror: In eval mode, w, u and l are those of the image and of its mirror image, averaged
            before they are normalised.

    Attributes:
        embed_dim: D.
        num_parts: K.
        mirror: As above; `ReIDModel` reads it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_stripes: Annotated[int, Range(1, 1024)] = 2,
        mirror: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = num_stripes
        self.granularities = (num_stripes,)
        self.mirror = mirror
        self.embedding = nn.Linear(self.embed_dim, self.embed_dim, bias=False)
        nn.init.kaiming_normal_(self.embedding.weight, mode="fan_out")
        self.neck = Neck(self.embed_dim)
        self.neck.bias.requires_grad_(True)

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D); `test` (B, (1 + K) D).

        Raises:
            ValueError: The map has fewer rows than there are stripes.
        """
        banks = [features.tokens[:, 0], *pool_stripes(features, self.num_parts)]
        pre = torch.stack(banks, 1).float()
        embedding = F.relu(self.neck(self.embedding(banks[0])))
        post = torch.cat((embedding[:, None], pre[:, 1:]), 1)
        return Embeddings(pre, post, normalize(pre), normalize(pre.flatten(1)))
