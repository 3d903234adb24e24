"""Features like those of a trained network: few main dimensions, clusters, some duplicates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_IMAGES_PER_PERSON = 31  # as in MSMT17
_DIMENSIONS = 64
_BLOCK = 65_536


def trained_like(count: int, dim: int, *, ties: bool = False, seed: int = 0) -> Tensor:
    """(count, dim) unit vectors around persons' centres in a subspace.

    Args:
        count: N.
        dim: D.
        ties: A twentieth are exact copies of others, and a tenth lie on a coarse lattice, where
            many distances are equal.
        seed: Seed of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = min(_DIMENSIONS, dim)
    basis = torch.linalg.qr(torch.randn(dim, inner, generator=generator))[0]
    scale = torch.arange(1, inner + 1).rsqrt()  # as principal values fall
    persons = max(count // _IMAGES_PER_PERSON, 2)
    centres = torch.randn(persons, inner, generator=generator) * scale
    features = torch.empty(count, dim)
    for start in range(0, count, _BLOCK):
        part = features[start : start + _BLOCK]
        person = torch.randint(persons, (len(part),), generator=generator)
        inside = torch.randn(len(part), inner, generator=generator) * scale
        outside = torch.randn(len(part), dim, generator=generator)
        part.copy_((centres[person] + 0.45 * inside) @ basis.T + 0.02 * outside)
    if ties:
        order = torch.randperm(count, generator=generator)
        copies, lattice = order[: count // 20], order[count // 20 : count // 20 + count // 10]
        features[lattice] = (8 * F.normalize(features[lattice], dim=1)).round()
        features[copies] = features[order[-len(copies) :]] if len(copies) else features[copies]
    return F.normalize(features, dim=1)
