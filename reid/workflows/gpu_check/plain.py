"""A training step of TMGF that follows the paper's equations, operation by operation.

First implementations look like this, and so does much published code: attention as
softmax(q k^T) v, losses and memory sample by sample, an optimizer that handles one parameter after
the other. It gives the same numbers and shows how much faster the framework is.

Li, Wang and Gong, *Transformer Based Multi-Grained Features for Unsupervised Person
Re-Identification* (WACV workshops 2023); Wang et al., *O2CAP* (TIP 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.ibn import IBN
from reid.structures import PseudoLabels

TEMPERATURE, MOMENTUM, BALANCE, PART_WEIGHT = 0.07, 0.2, 0.15, 0.1
POSITIVES, NEGATIVES = 3, 50
CAMERA_SCALE = 3.0


class PlainNetwork(nn.Module):
    """TMGF's network on the weights of a `ReIDModel` of IBNViT and TMGFHead.

    Args:
        network: Its modules are used; stochastic depth is left out.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, camid: Tensor) -> Tensor:
        """Unit features (1 + K, B, D) of images (B, 3, H, W) of cameras (B,)."""
        backbone, head = self.network.backbone, self.network.head
        net = backbone.net
        patches = self._embed(net.patch_embed, image)
        x = torch.cat((net.cls_token.expand(len(patches), -1, -1), patches), 1)
        x = x + net.pos_embed + CAMERA_SCALE * backbone.camera_embed[camid]
        for block in net.blocks:
            x = self._layer(block, x)
        outputs = [norm(self._layer(block, x)) for block, norm in head.branches]
        whole = torch.stack([output[:, 0] for output in outputs]).mean(0)
        features = [head.neck(whole)]
        part = 0
        for output, count in zip(outputs, head.granularities, strict=True):
            rows = output[:, 1:].reshape(len(output), *backbone.grid, -1)
            for stripe in rows.tensor_split(count, 1):
                features.append(head.part_necks[part](stripe.mean((1, 2))))
                part += 1
        return torch.stack([F.normalize(feature.float(), dim=1) for feature in features])

    @staticmethod
    def _embed(stem: Any, image: Tensor) -> Tensor:
        x = image
        for layer in stem.conv:
            if isinstance(layer, IBN):
                first, second = x.chunk(2, 1)
                x = torch.cat((layer.IN(first.contiguous()), layer.BN(second.contiguous())), 1)
            else:
                x = layer(x)
        projected: Tensor = stem.proj(x)
        return projected.flatten(2).transpose(1, 2)

    @classmethod
    def _layer(cls, block: Any, x: Tensor) -> Tensor:
        x = x + cls._attend(block.attn, block.norm1(x))
        mlp: Tensor = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return x + mlp

    @staticmethod
    def _attend(attention: Any, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = attention.qkv(x).reshape(batch, count, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)
        mixed: Tensor = attention.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))
        return mixed


class PlainLosses:
    """O2CAP's losses with TMGF's settings, and their memory.

    Args:
        labels: Cluster and camera of each proxy.
        memory: (1 + K, P, D) unit vectors; `update` changes them in place.
    """

    def __init__(self, labels: PseudoLabels, memory: Tensor) -> None:
        self.labels = labels
        self.memory = memory
        self._cameras = torch.unique(labels.proxy_to_camera).tolist()

    def __call__(self, features: Tensor, rows: Tensor) -> Tensor:
        """The sum of all losses of unit features (1 + K, B, D) whose proxies are `rows` (B,)."""
        banks, count, _ = features.shape
        total = features.new_zeros(())
        for bank in range(banks):
            weight = (1.0 if bank == 0 else PART_WEIGHT / (banks - 1)) / count
            for sample in range(count):
                loss = self._sample(features[bank, sample], self.memory[bank], int(rows[sample]))
                total = total + weight * loss
        return total

    def _sample(self, feature: Tensor, memory: Tensor, row: int) -> Tensor:
        """Offline and online loss of a sample in a bank (TMGF, equations 7 and 8)."""
        similarity = memory @ feature
        mixed = BALANCE * similarity + (1 - BALANCE) * (memory @ memory[row])
        cluster = self.labels.proxy_to_cluster
        offline = (cluster == cluster[row]).nonzero()[:, 0]
        best = []
        for camera in self._cameras:
            members = (self.labels.proxy_to_camera == camera).nonzero()[:, 0]
            best.append(members[mixed[members].argmax()])
        candidates = torch.stack(best)
        online = candidates[mixed[candidates].argsort(descending=True)[:POSITIVES]]
        return self._contrast(similarity, offline, similarity) + self._contrast(
            similarity, online, mixed
        )

    @staticmethod
    def _contrast(similarity: Tensor, positives: Tensor, ranking: Tensor) -> Tensor:
        order = ranking.detach().argsort(descending=True)
        negatives = order[~torch.isin(order, positives)][:NEGATIVES]
        chosen = similarity[torch.cat((positives, negatives))] / TEMPERATURE
        return -F.log_softmax(chosen, 0)[: len(positives)].mean()

    @torch.no_grad()
    def update(self, features: Tensor, rows: Tensor) -> None:
        """Updates the memory sample by sample (TMGF, equation 6)."""
        for sample, row in enumerate(rows.tolist()):
            for bank in range(len(features)):
                moved = MOMENTUM * self.memory[bank, row]
                moved = moved + (1 - MOMENTUM) * features[bank, sample]
                self.memory[bank, row] = F.normalize(moved, dim=0)
