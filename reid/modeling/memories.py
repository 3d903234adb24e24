"""Memories: a unit vector for each cluster, proxy or image, moved by the batches."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.instructions import fast_bfloat16
from reid.structures import OUTLIER, FeatureSet

Update = Literal["sequential", "hard", "fixed"]
Fill = Literal["epoch", "once"]
MemoryDtype = Literal["fp32", "bf16"]
"""How a memory stores its rows: as the features are, or in half the space."""
_BLOCK_NUMBERS = 2**20

_FILLED_AT_ONCE = 8192
_LEAST_NORM = 1e-12  # that of torch's `normalize`


class ProxyMemory(nn.Module):
    """(1 + K) banks of P unit vectors, the global bank first; a row is a cluster, proxy or image.

    It is not a parameter: `update` moves it after the optimizer's step.

    Args:
        momentum: Share of the old row that an update keeps (mu).
        update: `sequential`: each sample moves its row, one by one in batch order. `hard`: only the
            sample that is least similar to its row moves it. `fixed`: no sample moves a row.
        fill: `epoch`: it is filled from the model's features at the start of each epoch. `once`: it
            is filled at the start of training and lasts, so checkpoints hold it
            (`Loss.memory_state`).
        dtype: How rows are stored. `bf16` takes half the space and reads half the bytes. A product
            with a unit feature then differs by at most 2^-9, since rows are rounded to 8 bits and
            the sums are in fp32. Updates are computed in fp32 from the stored rows and rounded
            once a step, so changes of less than 2^-9 of a number are lost: use it with a momentum
            well below 1. Where a checkpoint holds the rows, it holds them as they are stored.

    Attributes:
        rows: (1 + K, P, D), which `update` changes in place, after the backward pass.
        once: Whether `fill` is `once`.

    Raises:
        ValueError: The momentum is not in [0, 1], or `update`, `fill` or `dtype` is none of these
            words.
    """

    rows: Tensor

    def __init__(
        self,
        momentum: float,
        update: Update = "sequential",
        fill: Fill = "epoch",
        dtype: MemoryDtype = "fp32",
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected 0 <= momentum <= 1, got {momentum}")
        if update not in get_args(Update):
            raise ValueError(f"update: expected sequential, hard or fixed, got {update!r}")
        if fill not in get_args(Fill):
            raise ValueError(f"fill: expected epoch or once, got {fill!r}")
        if dtype not in get_args(MemoryDtype):
            raise ValueError(f"memory_dtype: expected fp32 or bf16, got {dtype!r}")
        self._dtype: MemoryDtype = dtype
        self._momentum = momentum
        self._update = update
        self.once = fill == "once"
        self.register_buffer("rows", torch.zeros(0, 0, 0), persistent=False)

    @property
    def lasts(self) -> bool:
        """Whether the memory has its rows for all of training, so that none are filled again."""
        return self.once and self.rows.shape[1] > 0

    def reset(self, row: Tensor, num_rows: int, features: FeatureSet) -> None:
        """Every row becomes the normalised mean feature of its images.

        Args:
            row: (N,) row of each image, -1 = none.
            num_rows: P.
            features: Features of the N images.
        """
        labelled = (row != OUTLIER).nonzero()[:, 0]
        _, banks, dim = features.unit.shape
        rows = features.unit.new_zeros((banks, num_rows, dim))
        # With a row for each image, copies would take as much memory as the memory itself.
        for sums, bank in zip(rows, features.unit.unbind(1), strict=True):
            for part in torch.split(labelled, _FILLED_AT_ONCE):
                sums.index_add_(0, row[part], bank[part])
        # The mean and the sum have the same direction.
        rows.div_(rows.norm(dim=2, keepdim=True).clamp_min_(_LEAST_NORM))
        self.rows = rows.bfloat16() if self._dtype == "bf16" else rows

    def similarity(self, feature: Tensor) -> Tensor:
        """Dot products (1 + K, B, P) of features (1 + K, B, D) with every row."""
        if self.rows.dtype == torch.bfloat16:
            products: Tensor = _Widened.apply(feature, self.rows)
            return products
        # With the memory as the second factor the result need not be turned, nor its gradient.
        return feature @ self.rows.transpose(1, 2)

    @torch.no_grad()
    def scores(self, feature: Tensor) -> Tensor:
        """`similarity` for choices, without gradient.

        With rows in bfloat16 the features and the results are rounded to it too, by at most 2^-9
        of each, where the device multiplies it.
        """
        if self.rows.dtype == torch.bfloat16 and fast_bfloat16(feature.device.type):
            found = feature.new_empty((*feature.shape[:2], self.rows.shape[1]))
            for bank, rows, part in zip(found, self.rows, feature.bfloat16(), strict=True):
                # A CPU is fast with the rows first, and with turning one matrix, but not a stack.
                bank.copy_((rows @ part.T).T.contiguous())
            return found
        return self.similarity(feature)

    def similarity_to(self, feature: Tensor, chosen: Tensor) -> Tensor:
        """Dot products (1 + K, B, n) of features (1 + K, B, D) with `chosen` rows (1 + K, B, n)."""
        banks, count, dim = self.rows.shape
        place = chosen + count * torch.arange(banks, device=chosen.device)[:, None, None]
        taken = F.embedding(place, self.rows.view(banks * count, dim)).to(feature.dtype)
        return torch.einsum("mbd,mbnd->mbn", feature, taken)

    @torch.no_grad()
    def update(self, row: Tensor, feature: Tensor, taken: Tensor | None = None) -> None:
        """Moves the rows of a batch: K_y <- normalise(mu K_y + (1 - mu) f).

        Sequential: sample by sample in batch order (Ge et al., *Self-paced Contrastive Learning*,
        NeurIPS 2020; O2CAP; TMGF, equation 6). Hard: once for each row, with the sample of the
        batch that has the smallest K_y . f, the first of equals (Dai et al., *Cluster Contrast*,
        ACCV 2022). Fixed: none.

        This never synchronises a GPU: no shape depends on the labels of the batch.

        Args:
            row: (B,) row of each sample, -1 = none.
            feature: (1 + K, B, D) unit vectors.
            taken: () bool on the device; where it is false no row moves. None: true.
        """
        if not len(row) or self._update == "fixed":
            return
        row, moved = self.moved(row, feature, taken)
        self.rows[:, row] = moved.to(self.rows.dtype)

    def moved(
        self, row: Tensor, feature: Tensor, taken: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rows (B,) that `update` would change, and what they become (1 + K, B, D).

        Samples of one row have the same result. A sample that moves nothing gives some row of the
        batch, also as that becomes.
        """
        moving = row != OUTLIER
        if taken is not None:
            moving = moving & taken
        # Samples that move nothing borrow a row of the batch: shapes stay fixed.
        row = torch.where(moving, row, row.max()).clamp(min=0)
        take = self._hardest if self._update == "hard" else self._one_by_one
        return row, take(row, moving, feature.detach())

    def _one_by_one(self, row: Tensor, moving: Tensor, feature: Tensor) -> Tensor:
        """Each sample's row after the batch (1 + K, B, D), moved sample by sample.

        Rows are independent: round 0 handles the first sample of every row, round 1 the second, and
        so on. Rows are sorted by falling number of samples, so at most the first B / (r + 1) rows
        have a sample in round r.
        """
        same = row[:, None] == row
        turn = same.tril(-1).sum(1)  # how many earlier samples have the same row
        count = same.sum(1)
        order = torch.where(turn == 0, -count, 1).argsort()  # first samples of rows lead
        place = torch.arange(len(row), device=row.device)
        slot = torch.empty_like(place).scatter_(0, order, place)[same.long().argmax(1)]
        sample_of = torch.full_like(same, -1, dtype=torch.int64)  # (round, slot)
        sample_of[turn, slot] = place
        state = self.rows[:, row[order]].to(feature.dtype)
        # Reading the count from a GPU would synchronise, so there we take the maximum.
        rounds = int(count.max()) if row.device.type == "cpu" else len(row)
        for number in range(rounds):
            active = len(row) // (number + 1)
            sample = sample_of[number, :active]
            moved = self._move(state[:, :active], feature[:, sample])
            moves = ((sample >= 0) & moving[sample])[:, None]
            state[:, :active] = torch.where(moves, moved, state[:, :active])
        return state[:, slot]

    def _hardest(self, row: Tensor, moving: Tensor, feature: Tensor) -> Tensor:
        """Each sample's row after the batch (1 + K, B, D), moved by the hardest sample."""
        current = self.rows[:, row].to(feature.dtype)
        score = (current * feature).sum(2).masked_fill(~moving, torch.inf)
        candidates = torch.where(row[:, None] == row, score[:, None], torch.inf)  # (1 + K, B, B)
        hardest = candidates.argmin(2)
        moved = self._move(current, feature.gather(1, hardest[..., None].expand_as(feature)))
        return torch.where(moving[hardest][..., None], moved, current)

    def _move(self, old: Tensor, feature: Tensor) -> Tensor:
        return F.normalize(self._momentum * old + (1 - self._momentum) * feature, dim=2)


class _Widened(torch.autograd.Function):
    """Products of features with rows in bfloat16, which are widened block by block.

    Only the rows are rounded: features, products and sums keep the features' type, forward and
    backward, and no copy of the memory is made.
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor, rows: Tensor) -> Tensor:
        ctx.rows = rows
        products = feature.new_empty((*feature.shape[:2], rows.shape[1]))
        for block in _row_blocks(rows):
            wide = rows[:, block].to(feature.dtype)
            products[:, :, block] = feature @ wide.transpose(1, 2)
        return products

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows: Tensor = ctx.rows
        total = gradient.new_zeros((*gradient.shape[:2], rows.shape[2]))
        for block in _row_blocks(rows):
            total.baddbmm_(gradient[:, :, block], rows[:, block].to(gradient.dtype))
        return total, None


def _row_blocks(rows: Tensor) -> list[slice]:
    """Slices of the P rows, of about a million numbers in all banks."""
    size = max(1, _BLOCK_NUMBERS // max(1, rows.shape[0] * rows.shape[2]))
    return [slice(start, start + size) for start in range(0, rows.shape[1], size)]
