"""Causal attention in which a learned logit per head, the sink, joins the softmax's denominator (GPT-OSS).

h heads, g groups of them that share a key (g = h unless flash attention takes groups), Sq queries, the last of Sk
positions, d size of a head.

With L the log-sum-exp of a query's scores, its output is that without a sink times σ(L − sink). So any kernel that
gives L computes it, and the same kernel's backward, which makes its probabilities of L, takes log(exp L + exp sink) in
its place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from moesys.kernels.choose import choose

aten = torch.ops.aten
# torch's public attention gives no log-sum-exp, save flex_attention, which has no backward on CPU.

ALIGNED = 16
"""Numbers in a row of a mask for the memory-efficient kernel, or a multiple of it."""


def reference(
    q_BhSd: Tensor, k_BhSd: Tensor, v_BhSd: Tensor, sink_h: Tensor, mask: Tensor | None = None, scale: float = 0.0
) -> Tensor:
    """`attend_with_sinks` by its definition, in float32 or wider: q, k, v, `mask` and sinks [h] as there."""
    wide, shared = torch.promote_types(q_BhSd.dtype, torch.float32), q_BhSd.shape[1] // k_BhSd.shape[1]
    k, v = (x.to(wide).repeat_interleave(shared, 1) for x in (k_BhSd, v_BhSd))
    scores = q_BhSd.to(wide) @ k.transpose(-1, -2) * (scale or q_BhSd.shape[-1] ** -0.5)
    scores = scores.masked_fill(~(lower_right(q_BhSd, k) if mask is None else mask), -torch.inf)
    sinks = sink_h.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return (torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v).to(q_BhSd.dtype)


def lower_right(q_BhSd: Tensor, k_BgSd: Tensor) -> Tensor:
    """True where a query sees a key, the last query all of them: bool [Sq, Sk]."""
    queries, keys = q_BhSd.shape[2], k_BgSd.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q_BhSd.device).tril(keys - queries)


def attend_with_sinks(
    q_BhSd: Tensor, k_BgSd: Tensor, v_BgSd: Tensor, sink_h: Tensor, mask: Tensor | None = None, scale: float = 0.0
) -> Tensor:
    """softmax over (scores, sink) without the sink's column, times v: q [B, h, Sq, d], k and v [B, g, Sk, d].

    Args:
        sink_h: floating [h].
        mask: bool, to be broadcast to [B, h, Sq, Sk], True where a query sees a key; None: the query i sees keys
            0 … Sk − Sq + i. A query sees one key at least.
        scale: factor on the scores; 0: 1 / √d.
    """
    kernel = _kernel(q_BhSd, k_BgSd, v_BgSd, mask)
    if kernel == "reference":
        return reference(q_BhSd, k_BgSd, v_BgSd, sink_h, mask, scale)
    if mask is None and kernel != "flash" and q_BhSd.shape[2] != k_BgSd.shape[2]:
        mask = lower_right(q_BhSd, k_BgSd)  # these kernels' own causal masks count from the first key
    bias = None if mask is None else _as_bias(mask, q_BhSd)
    out: Tensor = _WithSinks.apply(q_BhSd, k_BgSd, v_BgSd, sink_h, bias, scale or None, kernel)
    return out


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The fused kernel that takes these; "reference" if none does."""
    if choose(q, "attention_sinks") == "reference":
        return "reference"
    if not q.is_cuda:
        return "cpu"
    grouped = q.shape[1] != k.shape[1]
    if mask is None and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, grouped)):
        return "flash"
    fits = not grouped and can_use_efficient_attention(SDPAParams(q, k, v, None, 0.0, mask is None, False))
    return "efficient" if fits else "reference"


def _as_bias(mask: Tensor, q: Tensor) -> Tensor:
    """0 where `mask`, else −∞, in rows that are aligned in memory, expanded to [B, h, Sq, Sk] on a GPU."""
    keys = mask.shape[-1]
    row = -(-keys // ALIGNED) * ALIGNED if q.is_cuda else keys
    bias = torch.zeros(*mask.shape[:-1], row, dtype=q.dtype, device=q.device)[..., :keys]
    bias = bias.masked_fill_(~mask, -torch.inf)
    return bias.expand(*q.shape[:3], keys) if q.is_cuda else bias


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_h, bias, scale, kernel):  # type: ignore[override]
        causal, rest = bias is None, ()
        if kernel == "cpu":
            out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=bias, scale=scale
            )
        elif kernel == "flash":
            out, log_sum, *rest, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
        else:
            out, log_sum, *rest = aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, 0.0, causal, scale=scale
            )
        sinks = sink_h.to(log_sum.dtype).view(1, -1, 1)
        share = torch.sigmoid(log_sum - sinks)[..., : q.shape[2]].unsqueeze(-1)
        out = (out * share).to(q.dtype)
        tensors = [x for x in rest if isinstance(x, Tensor)]
        ctx.rest = [(True, None) if isinstance(x, Tensor) else (False, x) for x in rest]
        ctx.scale, ctx.kernel = scale, kernel
        ctx.save_for_backward(q, k, v, sink_h, bias, out, torch.logaddexp(log_sum, sinks), *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, sink_h, bias, out, log_sum, *tensors = ctx.saved_tensors
        found, scale = iter(tensors), ctx.scale
        rest = [next(found) if saved else x for saved, x in ctx.rest]
        if ctx.kernel == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, log_sum, 0.0, bias is None, attn_mask=bias, scale=scale
            )
        elif ctx.kernel == "flash":
            cum_q, cum_k, most_q, most_k, seed, offset = rest
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, log_sum, cum_q, cum_k, most_q, most_k, 0.0, True, seed, offset, scale=scale
            )
        else:
            seed, offset = rest
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, out, log_sum, seed, offset, 0.0, [True, True, True, False], bias is None,
                scale=scale,
            )[:3]  # fmt: skip
        return *grads, _of_sinks(grad, out, log_sum, sink_h), None, None, None


def _of_sinks(grad: Tensor, out: Tensor, log_sum: Tensor, sink_h: Tensor) -> Tensor:
    """The gradient [h] of the sinks, whose value is zero: −Σ p · (gradient · output), p the sink's probability."""
    along = torch.linalg.vecdot(grad.to(log_sum.dtype), out.to(log_sum.dtype))
    chance = torch.exp(sink_h.to(log_sum.dtype).view(1, -1, 1) - log_sum[..., : out.shape[2]])
    return -(chance * along).sum((0, 2)).to(sink_h.dtype)
