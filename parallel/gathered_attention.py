"""Causal attention of a rank's two chunks of queries to the keys of the whole sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys.models.attention import attend
from moesys.parallel.comm import CONTEXT
from moesys.parallel.flight import gather_rows


class GatheredCore(nn.Module):
    """`CausalCore` for a rank that holds chunks r and 2·cp−1−r of 2·cp (`moesys.parallel.context`)."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, q_BShd: Tensor, k_BSgd: Tensor, v_BSgd: Tensor) -> Tensor:
        """q [B, S/cp, h, d], k [B, S/cp, g, d], v [B, S/cp, g, dv] → [B, S/cp, h, dv]."""
        keys, values = self._whole(k_BSgd), self._whole(v_BSgd)
        rank, cp = self.group.rank(), self.group.size()
        size = q_BShd.shape[1] // 2
        out = []
        for chunk, q in zip((rank, 2 * cp - 1 - rank), q_BShd.split(size, dim=1), strict=True):
            end = (chunk + 1) * size
            out.append(attend(q, keys[:, :end], values[:, :end]))
        return torch.cat(out, dim=1)

    def _whole(self, x_BSgd: Tensor) -> Tensor:
        """The whole sequence in its own order, from every rank's two chunks."""
        cp = self.group.size()
        rows = gather_rows(x_BSgd.transpose(0, 1), self.group, CONTEXT)
        parts = rows.transpose(0, 1).chunk(2 * cp, dim=1)
        return torch.cat([*parts[::2], *reversed(parts[1::2])], dim=1)
