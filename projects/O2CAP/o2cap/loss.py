"""O2CAP's losses: offline and online association of camera-aware proxies."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.modeling.contrastive import Average, ProxyGroups, choose_online
from reid.modeling.losses import Temperature
from reid.modeling.memories import MemoryDtype
from reid.modeling.memory_losses import ProxyLoss
from reid.registry import LOSS
from reid.structures import FeatureSet, PseudoLabels


@LOSS.register()
class O2CAPLoss(ProxyLoss):
    """Offline and online camera-aware proxy losses: `offline`, `online`.

    Wang et al., *Offline-Online Associated Camera-Aware Proxies for Unsupervised Person
    Re-identification* (O2CAP, TIP 2022); with parts, TMGF (section 3.3, equations 6 to 9). Each
    bank of the memory has these losses, with its own choice of proxies:

    - offline: positives are all proxies of the sample's cluster; negatives are the most similar
      others;
    - online: proxies are scored by `balance` * similarity to the feature + (1 - `balance`) *
      similarity to the proxy of the sample. Among the best proxies of each camera, the best are
      the positives, whatever their cluster; negatives are the most similar others.

    A loss is the cross entropy between the softmax over positives and negatives and an even target
    on the positives. O2CAP averages by `camera`, TMGF over the `batch`.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        balance: Weight of the feature's own similarity in the online choice.
        part_weight: Weight of the mean over the parts, if the model has any (lambda_p).
        num_positives: Number of online positives; at most one for each camera.
        num_negatives: Number of negatives; all other proxies if there are fewer.
        average: See `sample_weights`.
        memory_dtype: `bf16` stores the memory in half the space; see `ProxyMemory`. Losses are
            computed in fp32 from its rows, and only the choice of proxies from rounded
            similarities, where the device multiplies bfloat16.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        temperature: Temperature = 0.07,
        momentum: float = 0.2,
        balance: float = 0.15,
        part_weight: float = 0.1,
        num_positives: int = 3,
        num_negatives: int = 50,
        average: Average = "batch",
        memory_dtype: MemoryDtype = "fp32",
    ) -> None:
        super().__init__(temperature, momentum, num_negatives, part_weight, average, memory_dtype)
        if not 0 <= balance <= 1:
            raise ValueError(f"balance: expected 0 <= balance <= 1, got {balance}")
        if num_positives < 1:
            raise ValueError(f"num_positives: expected 1 or more, got {num_positives}")
        self._balance = balance
        self._num_positives = num_positives
        self._cameras = ProxyGroups(torch.zeros(0, dtype=torch.int64))

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and fills the memory.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        super().set_labels(labels, features)
        # Only cameras with a proxy: a camera whose images are all outliers is ignored.
        self._cameras = ProxyGroups(labels.proxy_to_camera)

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`offline` and `online` (1 + K, B)."""
        with torch.no_grad():
            # b K.f + (1 - b) K.K_y = K.(b f + (1 - b) K_y): so one product is enough
            proxy = self.memory.rows[:, row].to(feature.dtype)
            mixed = torch.lerp(proxy, feature, self._balance)
            both = self.memory.scores(torch.cat((feature, mixed), 1))
            scores, similarity = both.chunk(2, 1)
        choice = choose_online(similarity, self._cameras, self._num_positives, self._num_negatives)
        return {
            "offline": self.offline_losses(feature, scores, row),
            "online": self._choice_loss(feature, choice),
        }
