"""Shared experts over Megatron-Core's tensor-parallel ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from moesys.models.layers import FeedForward


class SharedExperts(FeedForward):
    """This rank's slice of the inner size of a feed-forward for every token: [S, B, H] → same.

    Args:
        hidden, width: H and the inner size of the whole.
        activation: a kind of `moesys.kernels.activation`.
        group: the tensor-parallel ranks, which must divide `width`.
        sequence_parallel: True if each of them has a part of S.
        batch_first: True if input and output are [B, S, H].
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        activation: str,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        batch_first: bool = False,
    ):
        super().__init__(hidden, width // group.size(), activation)
        self.group, self.sequence_parallel, self.batch_first = group, sequence_parallel, batch_first

    def forward(self, x: Tensor) -> Tensor:
        """The output of x, both [S, B, H], or [B, S, H] with `batch_first`."""
        if self.group.size() == 1:
            return super().forward(x)
        if self.batch_first:
            return self._split(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return self._split(x)

    def _split(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            whole = mappings.gather_from_sequence_parallel_region(x, group=self.group)
            return mappings.reduce_scatter_to_sequence_parallel_region(super().forward(whole), group=self.group)
        copied = mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        return mappings.reduce_from_tensor_model_parallel_region(super().forward(copied), group=self.group)
