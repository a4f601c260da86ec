"""Causal self-attention: grouped-query and multi-head latent.

B sequences, S tokens held by this device, H hidden, h heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import CausalBias, causal_lower_right

from moesys.kernels.attention_sinks import attend_with_sinks, lower_right
from moesys.kernels.rotary import rotate
from moesys.models.layers import Linear, RMSNorm


class CausalCore(nn.Module):
    """softmax(q·kᵀ / √d + causal mask)·v through torch's scaled-dot-product attention.

    The one place where tokens of a sequence meet; context parallelism replaces it.

    Args:
        window: tokens that a token sees, itself the last of them; None: all before it.
        scale: factor on the scores; None: 1 / √d.
    """

    def __init__(self, window: int | None = None, scale: float | None = None):
        super().__init__()
        self.window, self.scale = window, scale

    def forward(self, q_BShd: Tensor, k_BSgd: Tensor, v_BSgd: Tensor, sink_h: Tensor | None = None) -> Tensor:
        """q [B, S, h, d], k [B, before + S, g, d], v [B, before + S, g, dv], g dividing h, sinks [h]: [B, S, h, dv].

        Keys may stand before the first query, as when a sequence is decoded piece by piece: with a window, fewer than
        that before more than one query.
        """
        if self.window is not None and self.window < k_BSgd.shape[1]:
            before = k_BSgd.shape[1] - q_BShd.shape[1]
            return attend_window(q_BShd, k_BSgd, v_BSgd, self.window, before, scale=self.scale, sink_h=sink_h)
        return attend(q_BShd, k_BSgd, v_BSgd, scale=self.scale, sink_h=sink_h)


def attend(
    q_BShd: Tensor,
    k_BSgd: Tensor,
    v_BSgd: Tensor,
    bias: CausalBias | None = None,
    scale: float | None = None,
    sink_h: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last queries of a sequence to its keys: q [B, Sq, …], k and v [B, Sk, …].

    Query i sees keys 0 … Sk − Sq + i. No mask reaches a GPU: there one would leave only torch's slow path, which
    keeps a score for each pair of tokens.

    Args:
        bias: `causal_lower_right(Sq, Sk)` where Sq < Sk, or None to make it here, which torch.compile cannot trace.
        scale: factor on the scores; None: 1 / √d.
        sink_h: a logit per head [h] that joins the softmax's denominator; None: none does.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BShd, k_BSgd, v_BSgd))
    grouped = q.shape[1] != k.shape[1]
    if grouped and not takes_groups(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    if sink_h is not None:
        return attend_with_sinks(q, k, v, sink_h, scale=scale or 0.0).transpose(1, 2)
    mask: Tensor | None = None
    if q.shape[2] != k.shape[2] and q.is_cuda:
        mask = causal_lower_right(q.shape[2], k.shape[2]) if bias is None else bias
    elif q.shape[2] != k.shape[2]:
        mask = lower_right(q, k)  # the CPU's fused kernel takes a mask, and no bias
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
    )
    return out.transpose(1, 2)


def attend_window(
    q_BShd: Tensor,
    k_BSgd: Tensor,
    v_BSgd: Tensor,
    window: int,
    before: int = 0,
    scale: float | None = None,
    sink_h: Tensor | None = None,
) -> Tensor:
    """Attention of each query to the `window` last keys up to its own: q [B, S, h, d], k and v [B, before + S, g, …].

    Sliding-window attention (Longformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825). Queries are taken in pieces
    of `window`, and each piece with the two pieces of keys that it can see, so that time and memory grow with
    S · window, on every device, through the kernels that take a mask.

    Args:
        before: keys that stand before the first query, fewer than `window`.
        scale, sink_h: as those of `attend`.
    """
    batch, tokens = q_BShd.shape[:2]
    pieces = -(-tokens // window)
    filled = pieces * window - tokens
    q = nn.functional.pad(q_BShd, (0, 0, 0, 0, 0, filled))
    k, v = (nn.functional.pad(x, (0, 0, 0, 0, window - before, filled)) for x in (k_BSgd, v_BSgd))
    q = q.unflatten(1, (pieces, window)).flatten(0, 1)
    k, v = (x.unflatten(1, (pieces + 1, window)) for x in (k, v))
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))
    # Query i of a piece is key window + i of its two pieces; the first piece has none but `before` keys before it.
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)
    seen = (key <= query) & (key > query - window)
    first = (torch.arange(pieces, device=q.device) == 0)[:, None, None] & (key < window - before)
    mask = (seen & ~first).repeat(batch, 1, 1).unsqueeze(1)
    heads = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if heads > 1:
        k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    if sink_h is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = attend_with_sinks(q, k, v, sink_h, mask, scale or 0.0)
    return out.transpose(1, 2).unflatten(0, (batch, pieces)).flatten(1, 2)[:, :tokens]


def takes_groups(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a fused kernel shares each key head among several query heads [B, h, S, d], as flash attention does.

    The others want a copy of the key for each query: `enable_gqa` would fall back to the slow path. They are the
    CPU's, and on a GPU the memory-efficient one, which float32 and heads of two sizes take.
    """
    return q.is_cuda and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True))


def turn(x_BShd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, S, h, d] whose first elements, as many as the tables [S, …] have, are rotated."""
    turned = cos.shape[-1]
    if turned == x_BShd.shape[-1]:
        return rotate(x_BShd, cos, sin)
    if not turned:
        return x_BShd
    return torch.cat((rotate(x_BShd[..., :turned], cos, sin), x_BShd[..., turned:]), -1)


class Sinks(nn.Module):
    """A learned logit per head that joins the softmax's denominator (GPT-OSS); starts as zeros."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the weight its initial values."""
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """The logits [h]."""
        return self.weight


class GroupedQueryAttention(nn.Module):
    """Attention whose key and value heads are shared by groups of query heads (arXiv 2305.13245)."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        output_bias: bool | None = None,
        qk_norm: str = "none",
        eps: float = 1e-5,
        window: int | None = None,
        scale: float | None = None,
        sinks: bool = False,
        centered: bool = False,
        clip: float | None = None,
        output_gate: bool = False,
    ):
        """Makes the projections and what stands around them.

        Args:
            output_bias: of the output; default: as `bias`, that of the others.
            qk_norm: "none", or an RMSNorm of queries and keys: per "head", over all of them ("full"), or
                "head_after_rotary".
            window, scale: as those of `CausalCore`.
            sinks: whether each head has a sink.
            centered: factors of the norms are 1 + their weights.
            clip: bound of queries, keys and values; None: none.
            output_gate: whether the result is multiplied by a sigmoid of the token.
        """
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.gate_proj = Linear(hidden, heads * head_dim, bias=False) if output_gate else None
        self.o_proj = Linear(heads * head_dim, hidden, bias=bias if output_bias is None else output_bias)
        self.qk_norm, self.clip = qk_norm, clip
        sizes = (heads * head_dim, kv_heads * head_dim) if qk_norm == "full" else (head_dim,) * 2
        self.q_norm, self.k_norm = (None if qk_norm == "none" else RMSNorm(size, eps, centered) for size in sizes)
        self.sinks = Sinks(heads) if sinks else None
        self.core = CausalCore(window, scale)

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Projected queries, keys or values as heads [B, S, h, d]."""
        if norm is not None and self.qk_norm == "full":
            x = norm(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        return x.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x_BShd: Tensor, norm: nn.Module | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys with their positions."""
        if norm is not None and self.qk_norm == "head":
            x_BShd = norm(x_BShd)
        x_BShd = turn(x_BShd, cos, sin)
        return norm(x_BShd) if norm is not None and self.qk_norm == "head_after_rotary" else x_BShd

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]; cos, sin [S, d]: tables of the tokens' positions, for d elements of each head."""
        q = self._turned(self._heads(self.q_proj(x_BSH), self.q_norm), self.q_norm, cos, sin)
        k = self._turned(self._heads(self.k_proj(x_BSH), self.k_norm), self.k_norm, cos, sin)
        v = self._heads(self.v_proj(x_BSH))
        out = self.core(q, k, v, None if self.sinks is None else self.sinks()).flatten(2)
        if self.gate_proj is not None:
            out = out * self.gate_proj(x_BSH).sigmoid()
        return self.o_proj(out)


class SharedKey(nn.Module):
    """The rotary part of the key that all heads share, rotated: [B, S, d] → [B, S, 1, d]."""

    def forward(self, k_BSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(k_BSd.unsqueeze(2), cos, sin)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one small latent.

    Each head's query and key have a part without position and one with rotary position; the key's
    rotary part is shared by all heads.

    Attributes:
        history: None, or takes the latents [B, S, latent] and shared rotated keys [B, S, 1, rope] of these tokens, and
            gives those of all tokens up to them, as decoding a sequence piece by piece needs.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        nope: int,
        rope: int,
        value: int,
        latent: int,
        query_rank: int | None = None,
        eps: float = 1e-5,
        scale: float | None = None,
    ):
        """`nope`, `rope`, `value`: sizes of a head's parts; `latent`, `query_rank`: of what is compressed; `scale`: as
        that of `CausalCore`."""
        super().__init__()
        self.nope, self.rope, self.value, self.latent = nope, rope, value, latent
        query = heads * (nope + rope)
        if query_rank is None:
            self.q_proj = Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = Linear(hidden, query_rank, bias=False)
            self.q_a_norm = RMSNorm(query_rank, eps)
            self.q_b_proj = Linear(query_rank, query, bias=False)
        self.compress_query = query_rank is not None
        self.kv_a_proj = Linear(hidden, latent + rope, bias=False)
        self.kv_a_norm = RMSNorm(latent, eps)
        self.kv_b_proj = Linear(latent, heads * (nope + value), bias=False)
        self.shared_key = SharedKey()
        self.o_proj = Linear(heads * value, hidden, bias=False)
        self.core = CausalCore(scale=scale)
        self.history: nn.Module | None = None

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]; cos, sin [S, qk_rope_head_dim]: tables of the tokens' positions."""
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSH))) if self.compress_query else self.q_proj(x_BSH)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj(x_BSH).split((self.latent, self.rope), -1)
        latent, k_rope = self.kv_a_norm(latent), self.shared_key(k_rope, cos, sin)
        if self.history is not None:
            latent, k_rope = self.history(latent, k_rope)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.value))
        k_nope, v = kv.split((self.nope, self.value), -1)
        k_rope = k_rope.expand(-1, -1, k_nope.shape[2], -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        return self.o_proj(self.core(q, torch.cat((k_nope, k_rope), -1), v).flatten(2))
