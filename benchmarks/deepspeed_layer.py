"""DeepSpeed's MoE layer, for comparison where it is installed. The project does not depend on it."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys.models.layers import FeedForward


class DeepSpeedLayer(nn.Module):
    """`deepspeed.moe.layer.MoE`: k choices, nothing dropped, SwiGLU experts over all ranks, weights of its own.

    [1, T, H] → the same shape. Collective over the world, whose process group must exist.
    """

    def __init__(self, hidden: int, ffn_hidden: int, experts: int, top_k: int, dtype: torch.dtype):
        super().__init__()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            from deepspeed.moe.layer import MoE

            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
            expert = FeedForward(hidden, ffn_hidden)
            self.layer = MoE(
                hidden, expert, num_experts=experts, ep_size=dist.get_world_size(), k=top_k, drop_tokens=False,
                use_rts=False,
            )  # fmt: skip
            self.layer.set_deepspeed_parallelism()
        self.layer.to(dtype)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, H] → the same shape."""
        return self.layer(x)[0]
