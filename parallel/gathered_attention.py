"""Causal attention of a rank's two chunks of queries to the keys of the whole sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right

from moesys.models.attention import attend, attend_window
from moesys.parallel.async_collectives import gather_rows
from moesys.parallel.comm import CONTEXT


class GatheredCore(nn.Module):
    """`CausalCore` for a rank that holds chunks r and 2·cp−1−r of 2·cp (`moesys.parallel.context`)."""

    def __init__(self, group: dist.ProcessGroup, seq_len: int, window: int | None = None, scale: float | None = None):
        """`seq_len`: tokens S of a whole sequence; `window`, `scale`: as those of `CausalCore`."""
        super().__init__()
        self.group, self.seq_len, self.scale = group, seq_len, scale
        self.window = window if window is not None and window < seq_len else None
        rank, cp = group.rank(), group.size()
        size = seq_len // (2 * cp)
        self.ends = [(chunk + 1) * size for chunk in (rank, 2 * cp - 1 - rank)]
        """Where the keys end that each chunk of queries sees."""
        self.biases = [causal_lower_right(size, end) for end in self.ends]

    def forward(self, q_BShd: Tensor, k_BSgd: Tensor, v_BSgd: Tensor, sink_h: Tensor | None = None) -> Tensor:
        """q [B, S/cp, h, d], k [B, S/cp, g, d], v [B, S/cp, g, dv], sinks [h] → [B, S/cp, h, dv].

        Raises:
            ValueError: the sequence is not as long as it was said to be.
        """
        if q_BShd.shape[1] * self.group.size() != self.seq_len:
            cp = self.group.size()
            rule = f"a context rank has {q_BShd.shape[1]} tokens of a sequence of {self.seq_len} over cp({cp})"
            raise ValueError(f"{rule}: it must have {self.seq_len // cp}")
        keys, values = self._whole(k_BSgd), self._whole(v_BSgd)
        parts = zip(q_BShd.chunk(2, dim=1), self.ends, self.biases, strict=True)
        out = [self._attend(q, keys, values, end, bias, sink_h) for q, end, bias in parts]
        return torch.cat(out, dim=1)

    def _attend(
        self,
        q_BShd: Tensor,
        keys_BSgd: Tensor,
        values_BSgd: Tensor,
        end: int,
        bias: CausalBias,
        sink_h: Tensor | None = None,
    ) -> Tensor:
        """One chunk of queries, the last of which stands at `end - 1`."""
        if self.window is None:
            seen = keys_BSgd.narrow(1, 0, end), values_BSgd.narrow(1, 0, end)
            return attend(q_BShd, *seen, bias, self.scale, sink_h)
        first = end - q_BShd.shape[1]
        before = min(first, self.window - 1)
        keys, values = (x.narrow(1, first - before, end - first + before) for x in (keys_BSgd, values_BSgd))
        return attend_window(q_BShd, keys, values, self.window, before, self.scale, sink_h)

    def _whole(self, x_BSgd: Tensor) -> Tensor:
        """The whole sequence in its own order, from every rank's two chunks."""
        cp = self.group.size()
        rows = gather_rows(x_BSgd.transpose(0, 1), self.group, CONTEXT)
        parts = rows.transpose(0, 1).chunk(2 * cp, dim=1)
        return torch.cat([*parts[::2], *reversed(parts[1::2])], dim=1)
