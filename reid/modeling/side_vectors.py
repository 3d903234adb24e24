"""Learned vectors of cameras and viewpoints (SIE), which a network adds to its tokens.

He et al., *TransReID* (ICCV 2021), section 3.3, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from reid.structures import VIEW, DataError, ImageRecord


def start_side_vectors(
    num_cameras: int, num_views: int, dim: int, unseen_cameras: Sequence[int] = ()
) -> Tensor:
    """Vectors (C, V, D) at the start: truncated normal, standard deviation 0.02.

    Args:
        num_cameras: C; 0: one row that holds for all cameras.
        num_views: V; 0: one column that holds for all viewpoints.
        dim: D.
        unseen_cameras: Cameras without training images. Their vectors are 0, and stay 0: they get
            no gradient, and weight decay keeps 0.
    """
    shape = (max(1, num_cameras), max(1, num_views), dim)
    vectors = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
    vectors[list(unseen_cameras)] = 0
    return vectors


def embed_side(table: Tensor, camid: Tensor | None, view: Tensor | None) -> Tensor:
    """The vectors (B, D) of images.

    What is unknown, outside the table, or was never learned (a vector of 0) is replaced by a mean
    of learned vectors: those of the image's viewpoint for an unknown camera, those of its camera
    for an unknown viewpoint, and all of them if neither is known.

    Args:
        table: (C, V, D).
        camid: (B,), -1 = unknown. None: the table has one row for all cameras.
        view: (B,), -1 = unknown. None: the table has one column for all viewpoints.

    Raises:
        ValueError: Neither is given.
    """
    given = view if camid is None else camid
    if given is None:
        raise ValueError("expected cameras, viewpoints or both, got neither")
    learned = table.detach().any(2)
    row, column = torch.zeros_like(given), torch.zeros_like(given)
    known_camera = torch.ones_like(given, dtype=torch.bool)
    if camid is not None:
        inside = (camid >= 0) & (camid < len(table))
        row = torch.where(inside, camid, 0)
        known_camera = inside & learned.any(1)[row]
    if view is None:
        return torch.where(known_camera[:, None], table[row, 0], _mean(table, learned, 0)[column])
    known_view = (view >= 0) & (view < table.shape[1])
    column = torch.where(known_view, view, 0)
    of_view = _mean(table, learned, 0)[column]
    of_camera = _mean(table, learned, 1)[row]
    of_all = _mean(table.flatten(0, 1), learned.flatten(), 0)
    return torch.where(
        known_camera[:, None],
        torch.where(known_view[:, None], table[row, column], of_camera),
        torch.where(known_view[:, None], of_view, of_all),
    )


def check_views(records: Sequence[ImageRecord], num_views: int) -> None:
    """Checks that images have viewpoints from 0 to `num_views` - 1, or -1 (unknown).

    Raises:
        DataError: An image has none, or another one.
    """
    for record in records:
        view = record.extra.get(VIEW)
        if not isinstance(view, (int, np.integer)) or not -1 <= view < num_views:
            raise DataError(
                f"{record.path}: expected a viewpoint from 0 to {num_views - 1}, or -1 if unknown, "
                f"for MODEL.BACKBONE.NUM_VIEWS {num_views}; got {view}. A CSV list gives "
                f"viewpoints in a column {VIEW}"
            )


def _mean(table: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """The mean along a dimension over the chosen vectors; 0 if there are none."""
    weight = chosen[..., None]
    return (table * weight).sum(dim) / weight.sum(dim).clamp(min=1)
