"""CAP's losses: a sample's proxy in its own camera, and its cluster across cameras."""

from __future__ import annotations

from torch import Tensor

from reid.modeling.contrastive import Average, info_nce
from reid.modeling.losses import Temperature
from reid.modeling.memories import MemoryDtype
from reid.modeling.memory_losses import ProxyLoss
from reid.registry import LOSS


@LOSS.register()
class CAPLoss(ProxyLoss):
    """Intra-camera and inter-camera contrast with camera-aware proxies: `intra`, `inter`.

    Wang et al., *Camera-aware Proxies for Unsupervised Person Re-Identification* (AAAI 2021):

    - intra: InfoNCE of the sample's proxy among the proxies of its own camera;
    - inter, from `inter_from_epoch` on (0 before): positives are all proxies of the sample's
      cluster, negatives are the most similar other proxies of any camera; the loss is the cross
      entropy between the softmax over both and an even target on the positives, times
      `inter_weight`.

    Both losses are averaged by `camera`, as in the published code: the means of the cameras in a
    batch are summed, not averaged.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        inter_weight: Weight of `inter`.
        inter_from_epoch: The first epoch with `inter`, from 0.
        num_negatives: Number of negatives of `inter`; all other proxies if there are fewer.
        part_weight: Weight of the mean over the parts, if the model has any.
        average: See `reid.modeling.contrastive.sample_weights`.
        memory_dtype: `bf16` stores the memory in half the space; see `ProxyMemory`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        temperature: Temperature = 0.07,
        momentum: float = 0.2,
        inter_weight: float = 0.5,
        inter_from_epoch: int = 5,
        num_negatives: int = 50,
        part_weight: float = 0.1,
        average: Average = "camera",
        memory_dtype: MemoryDtype = "fp32",
    ) -> None:
        super().__init__(temperature, momentum, num_negatives, part_weight, average, memory_dtype)
        if inter_weight < 0 or inter_from_epoch < 0:
            raise ValueError(
                "expected inter_weight and inter_from_epoch of 0 or more, got "
                f"{inter_weight}, {inter_from_epoch}"
            )
        self._inter_weight = inter_weight
        self._inter_from_epoch = inter_from_epoch

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`intra` and `inter` (1 + K, B)."""
        scores = self.memory.similarity(feature)
        same_camera = self.row_to_camera == self.row_to_camera[row][:, None]
        intra = info_nce(scores / self._temperature, row, same_camera)
        if self.epoch < self._inter_from_epoch:
            return {"intra": intra, "inter": intra.new_zeros(intra.shape)}
        inter = self.offline_losses(feature, scores.detach(), row)
        return {"intra": intra, "inter": self._inter_weight * inter}
