"""Caches of what attention needs of the tokens before, for decoding a sequence piece by piece.

Each takes the place of a module in a built mixer, as its description says (`Mixer.caches`). B sequences, S tokens of
this piece, N of it and all before, W of a window, g key heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.models.attention import CausalCore


class Rows:
    """Tensors [B, S, …] joined along dim 1, in storage that doubles when it is full."""

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self.length = 0

    def append(self, x_BS: Tensor) -> Tensor:
        """All rows with those of x [B, S, …] at their end: a view [B, N, …]."""
        end = self.length + x_BS.shape[1]
        if self._held is None or end > self._held.shape[1]:
            grown = x_BS.new_empty(x_BS.shape[0], 2 * end, *x_BS.shape[2:])
            if self._held is not None:
                grown[:, : self.length] = self._held[:, : self.length]
            self._held = grown
        self._held[:, self.length : end] = x_BS
        self.length = end
        return self._held[:, :end]


class Ring:
    """The last W rows of tensors [B, S, …] along dim 1, the newest in the place of the oldest."""

    def __init__(self, window: int):
        self.window, self.length = window, 0
        self._held: Tensor | None = None

    def append(self, x_BS: Tensor) -> Tensor:
        """The rows that those of x [B, S, …] see: of one token the last W in any order, else up to W − 1 before them,
        and x."""
        if self._held is None:
            self._held = x_BS.new_empty(x_BS.shape[0], self.window, *x_BS.shape[2:])
        end = self.length + x_BS.shape[1]
        before = torch.arange(max(0, self.length - self.window + 1), self.length, device=x_BS.device)
        seen = None if x_BS.shape[1] == 1 else torch.cat((self._held[:, before % self.window], x_BS), 1)
        kept = torch.arange(max(self.length, end - self.window), end, device=x_BS.device)
        self._held[:, kept % self.window] = x_BS[:, kept - self.length]
        self.length = end
        return self._held[:, : min(end, self.window)] if seen is None else seen


class CachedCore(nn.Module):
    """A `CausalCore` that remembers the keys and values of the tokens before, with a window those in it alone.

    Args:
        core: computes attention; its keys may stand before the first query.
    """

    def __init__(self, core: CausalCore):
        super().__init__()
        self.core, self.window = core, core.window
        self._keys, self._values = (Rows() if core.window is None else Ring(core.window) for _ in range(2))

    def forward(self, q_BShd: Tensor, k_BSgd: Tensor, v_BSgd: Tensor, sink_h: Tensor | None = None) -> Tensor:
        """q [B, S, h, d], k [B, S, g, d], v [B, S, g, dv], all of these tokens, and sinks [h]: [B, S, h, dv]."""
        out: Tensor = self.core(q_BShd, self._keys.append(k_BSgd), self._values.append(v_BSgd), sink_h)
        return out


class LatentCache(nn.Module):
    """The latents and the shared rotated keys of latent attention: (latent + rope) numbers per token."""

    def __init__(self) -> None:
        super().__init__()
        self._latents, self._keys = Rows(), Rows()

    def forward(self, latent_BSr: Tensor, k_BS1d: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens up to these: [B, N, latent] and [B, N, 1, rope]."""
        return self._latents.append(latent_BSr), self._keys.append(k_BS1d)
