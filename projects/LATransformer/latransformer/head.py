"""Parts that know the whole image: means of patches, joined with the class token."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from reid.modeling.heads import normalize
from reid.registry import HEAD, ConfigError, Range
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class LAHead(nn.Module):
    """Locally aware parts (Sharma et al., arXiv:2106.03720, section 3.2).

    The patches, in the order of their rows, are averaged in K windows: q_i is the mean of patches
    floor(i N / K) to ceil((i + 1) N / K) - 1, so neighbours overlap if K does not divide N. With as
    many parts as rows, each part is a row. The banks hold the class token g and the fused parts
    (g + lambda q_i) / (1 + lambda). There are no necks: the features before and after are the same.

    As in the published code, the test feature leaves the class token out: each q_i divided by its
    norm and by sqrt(K), joined to K D numbers, so that an inner product is the mean of K cosines.

    Args:
        backbone: Its `embed_dim` is D.
        num_parts: K.
        local_weight: lambda.

    Attributes:
        embed_dim: D.
        num_parts: K.

    Raises:
        ValueError: There is no part, or the weight is negative.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_parts: Annotated[int, Range(1, 1024)] = 14,
        local_weight: Annotated[float, Range(0, 1e6)] = 8.0,
    ) -> None:
        super().__init__()
        if num_parts < 1 or local_weight < 0:
            raise ValueError(
                "expected num_parts of 1 or more and local_weight of 0 or more, got "
                f"{num_parts}, {local_weight}"
            )
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = num_parts
        self._local_weight = local_weight

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D); the test feature has K D numbers.

        Raises:
            ConfigError: There are fewer patches than parts.
        """
        tokens = features.tokens.float()
        local = average_windows(tokens[:, 1:], self.num_parts)
        whole = tokens[:, :1]
        fused = (whole + self._local_weight * local) / (1 + self._local_weight)
        banks = torch.cat((whole, fused), 1)
        test = (normalize(local) / math.sqrt(self.num_parts)).flatten(1)
        return Embeddings(banks, banks, normalize(banks), test)


def average_windows(patches: Tensor, count: int) -> Tensor:
    """The means (B, K, D) of K windows of the patches (B, N, D); see `LAHead`.

    Raises:
        ConfigError: There are fewer patches than windows.
    """
    total = patches.shape[1]
    if count > total:
        raise ConfigError(
            f"model.head.num_parts: expected at most {total}, the backbone's patches, got {count}; "
            "a larger image gives more"
        )
    # Slices, since the gradient of torch's adaptive pooling is not repeatable on a GPU.
    return torch.stack(
        [
            patches[:, i * total // count : -(-(i + 1) * total // count)].mean(1)
            for i in range(count)
        ],
        1,
    )
