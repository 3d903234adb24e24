"""How parts and views are matched, and which of the results belong to hidden joints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Slots(NamedTuple):
    """Part features joined with views, one slot for each part.

    Attributes:
        fused: Parts joined with their nearest pose (B, K, D): a_i.
        view: The view that each part is nearest to (B, K) int64: k(i).
        feature: (B, K, D): z_i.
        hidden: Whether the joint of the slot's view is hidden (B, K) bool.
    """

    fused: Tensor
    view: Tensor
    feature: Tensor
    hidden: Tensor


def similarities(one: Tensor, other: Tensor) -> Tensor:
    """Cosines (B, K, J) of vectors (B, K, D) and (B, J, D); 0 with a vector of zeros."""
    return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT


def fill_slots(
    parts: Tensor, pose: Tensor, views: Tensor, hidden_joints: Tensor, *, own_part: bool = False
) -> Slots:
    """Matches parts with poses and views: PFD's PFA and PVM.

    Args:
        parts: s (B, K, D).
        pose: t (B, J, D), one for each joint; K = J.
        views: v (B, J, D).
        hidden_joints: (B, J) bool.
        own_part: Slot i joins part i with its nearest view. The published code joins the part that
            has the number of this view with view i.
    """
    posed = parts * pose
    fused = parts + _rows(posed, similarities(parts, posed).detach().argmax(2))
    view = similarities(fused, views).detach().argmax(2)
    feature = fused + _rows(views, view) if own_part else _rows(fused, view) + views
    return Slots(fused, view, feature, hidden_joints.gather(1, view))


def split_slots(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """The means of visible and of hidden slots, and the visible ones in their order.

    Returns:
        `visible` (B, D), the mean over all slots where none is visible; `hidden` (B, D), zeros
        where none is hidden; `listed` (B, K, D), the visible slots and then zeros. Where none is
        visible, the mean over all slots is the only one in the list.
    """
    seen = ~slots.hidden
    count = seen.sum(1, keepdim=True)
    whole = slots.feature.mean(1)
    visible = torch.where(count > 0, _mean(slots.feature, seen), whole)
    order = slots.hidden.int().argsort(dim=1, stable=True)
    place = torch.arange(seen.shape[1], device=seen.device)
    zero = torch.zeros((), dtype=whole.dtype, device=whole.device)
    listed = torch.where((place < count)[..., None], _rows(slots.feature, order), zero)
    alone = ((count == 0) & (place == 0))[..., None]
    listed = torch.where(alone, whole[:, None], listed)
    return visible, _mean(slots.feature, slots.hidden), listed


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (B, K) of values (B, J, D) -> (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean (B, D) of the chosen (B, K) of values (B, K, D); zeros where none is."""
    weight = chosen[..., None].to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)
