"""Cross-entropy of a micro-batch, on whole logits or on slices of the vocabulary over the tensor axis."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel


class TokenLoss:
    """Sum of the tokens' cross-entropies divided by `tokens`, the labels of the whole global batch.

    Labels −100 are ignored. Summed over micro-batches and ranks this is the mean over the global
    batch, in nats. With `axis`, logits are this rank's slice [B, S, V/tp] and are never gathered;
    forward and backward must run inside `context`.
    """

    def __init__(self, tokens: int, axis: DeviceMesh | None = None):
        self.tokens, self.axis = tokens, axis

    def context(self) -> AbstractContextManager:
        """torch's loss_parallel where the vocabulary is split, else nothing."""
        return nullcontext() if self.axis is None else loss_parallel()

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        wide = torch.promote_types(logits_BSV.dtype, torch.float32)
        logits = logits_BSV.flatten(0, 1).to(wide)
        labels = labels_BS.flatten()
        if self.axis is None:
            return nn.functional.cross_entropy(logits, labels, reduction="sum") / self.tokens
        split = DTensor.from_local(logits, self.axis, [Shard(-1)], run_check=False)
        whole = DTensor.from_local(labels, self.axis, [Replicate()], run_check=False)
        loss = nn.functional.cross_entropy(split, whole, reduction="sum") / self.tokens
        return loss.to_local() if isinstance(loss, DTensor) else loss
