"""The whole feed-forward of a layer's experts as one operation.

N rows sorted by expert, E experts, H hidden, G · F inner (G = 2 with a gated activation), counts_E
rows of each. On CPU each expert's rows pass through both products while they are in the cache, in
scratch memory that all experts share; for backward it keeps its inputs and h alone. On GPU it is
composed of grouped products and the fused activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesys.kernels import activation
from moesys.kernels import grouped_matmul as products
from moesys.kernels.choose import choose

BLOCK = 2**18
"""Elements of the inner activation that are worked on at once: fits a core's second-level cache."""


def reference(
    x_NH: Tensor,
    fc1_EHGF: Tensor,
    fc2_EFH: Tensor,
    counts_E: Tensor,
    kind: str = "swiglu",
    weight_N: Tensor | None = None,
    bias1_EGF: Tensor | None = None,
) -> Tensor:
    """`expert_ffn` by its definition."""
    h = products.reference(x_NH, fc1_EHGF.flatten(2), counts_E).unflatten(1, fc1_EHGF.shape[2:])
    if bias1_EGF is not None:
        h = h + bias1_EGF.repeat_interleave(counts_E, 0)
    return products.reference(activation.reference(h, kind, weight_N), fc2_EFH, counts_E)


def expert_ffn(
    x_NH: Tensor,
    fc1_EHGF: Tensor,
    fc2_EFH: Tensor,
    counts_E: Tensor,
    kind: str = "swiglu",
    weight_N: Tensor | None = None,
    bias1_EGF: Tensor | None = None,
) -> Tensor:
    """`(act(x · fc1 + bias1) · weight) · fc2`, each row with its expert's weights: [N, H].

    x, weights and bias of one floating type; `counts_E` int64 [E], sum N, any 0; `weight_N` float32
    (or wider), the routing weights, None for 1; `kind` as in `moesys.kernels.activation`.
    """
    way = choose(x_NH, "expert_ffn")
    if way == "reference":
        return reference(x_NH, fc1_EHGF, fc2_EFH, counts_E, kind, weight_N, bias1_EGF)
    if way == "torch" and not x_NH.is_cuda:
        return _blocked(x_NH, fc1_EHGF, fc2_EFH, counts_E, weight_N, bias1_EGF, kind)[0]
    h = products.grouped_matmul(x_NH, fc1_EHGF.flatten(2), counts_E).unflatten(1, fc1_EHGF.shape[2:])
    if bias1_EGF is not None:
        h = h + bias1_EGF.repeat_interleave(counts_E, 0, output_size=len(h))
    return products.grouped_matmul(activation.activate(h, kind, weight_N), fc2_EFH, counts_E)


@dataclass
class _Block:
    """Consecutive experts worked on together: their rows, and each expert's (number, rows)."""

    rows: slice
    experts: list[tuple[int, slice]]


def _blocks(counts: list[int], width: int) -> Iterator[_Block]:
    """Experts with rows, grouped until their inner activations fill the cache."""
    start = end = 0
    experts: list[tuple[int, slice]] = []
    for expert, count in enumerate(counts):
        if not count:
            continue
        if experts and (end + count - start) * width > BLOCK:
            yield _Block(slice(start, end), experts)
            start, experts = end, []
        experts.append((expert, slice(end, end + count)))
        end += count
    if experts:
        yield _Block(slice(start, end), experts)


@cache
def _slow_bfloat16() -> bool:
    """Whether products of bfloat16 are emulated: then float32 is several times faster, and no less exact."""
    return not torch.cpu._is_avx512_bf16_supported()


def _type(x: Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) and _slow_bfloat16() else x.dtype


@torch.library.custom_op("moesys::expert_ffn", mutates_args=())
def _blocked(
    x_NH: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    bias1: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """(output [N, H], h [N, G, F])."""
    width, kept = fc2.shape[1], _type(x_NH)
    out = torch.empty_like(x_NH)
    h = x_NH.new_empty(x_NH.shape[0], *fc1.shape[2:])
    scratch: dict[str, Tensor] = {}
    for block in _blocks(counts_E.tolist(), width):
        x, hidden = _as(x_NH[block.rows], kept), _space(scratch, "h", h[block.rows], kept)
        for expert, rows in block.experts:
            here = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
            torch.mm(x[here], _as(fc1[expert], kept).flatten(1), out=hidden[here].flatten(1))
            if bias1 is not None:
                hidden[here] += bias1[expert]
        weight = None if weight_N is None else weight_N[block.rows]
        inner = activation.forward(hidden, kind, weight)
        y = _space(scratch, "y", out[block.rows], kept)
        for expert, rows in block.experts:
            here = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
            torch.mm(inner[here], _as(fc2[expert], kept), out=y[here])
        if kept != x_NH.dtype:
            h[block.rows], out[block.rows] = hidden, y
    return out, h


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _space(scratch: dict[str, Tensor], name: str, target: Tensor, dtype: torch.dtype) -> Tensor:
    """`target` itself if it has the type to compute in, else memory of its shape, shared by all blocks."""
    if target.dtype == dtype:
        return target
    have = scratch.get(name)
    if have is None or len(have) < len(target):
        have = scratch[name] = torch.empty(target.shape, dtype=dtype)
    return have[: len(target)]


@torch.library.custom_op("moesys::expert_ffn_backward", mutates_args=())
def _blocked_backward(
    grad_NH: Tensor,
    x_NH: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    bias1: Tensor | None,
    h_NGF: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, fc1, fc2, weight and bias1; the last two are empty without their inputs."""
    counts, width, kept = counts_E.tolist(), fc2.shape[1], _type(x_NH)
    grad_x, grad1, grad2 = torch.empty_like(x_NH), torch.empty_like(fc1), torch.empty_like(fc2)
    grad_weight = x_NH.new_empty(0) if weight_N is None else torch.empty_like(weight_N)
    grad_bias = x_NH.new_empty(0) if bias1 is None else torch.zeros_like(bias1)
    for expert, count in enumerate(counts):
        if not count:
            grad1[expert].zero_()
            grad2[expert].zero_()
    most = max((b.rows.stop - b.rows.start for b in _blocks(counts, width)), default=0)
    # One piece of memory for every block: fresh pages cost more than the arithmetic on them.
    inner_space = torch.empty(most, width, dtype=kept)
    h_space = torch.empty(most, *fc1.shape[2:], dtype=kept)
    for block in _blocks(counts, width):
        size = block.rows.stop - block.rows.start
        experts = [(e, slice(r.start - block.rows.start, r.stop - block.rows.start)) for e, r in block.experts]
        x, dy = _as(x_NH[block.rows], kept), _as(grad_NH[block.rows], kept)
        d_inner, dh = inner_space[:size], h_space[:size]
        for expert, rows in experts:
            torch.mm(dy[rows], _as(fc2[expert], kept).t(), out=d_inner[rows])
        weight = None if weight_N is None else weight_N[block.rows]
        inner, dh, dw = activation.backward(d_inner, _as(h_NGF[block.rows], kept), kind, weight, out=dh)
        if dw is not None:
            grad_weight[block.rows] = dw
        dx = grad_x[block.rows] if kept == x_NH.dtype else torch.empty(size, x_NH.shape[1], dtype=kept)
        for expert, rows in experts:
            dh_e = dh[rows].flatten(1)
            _into(grad2[expert], inner[rows].t(), dy[rows])
            _into(grad1[expert].flatten(1), x[rows].t(), dh_e)
            torch.mm(dh_e, _as(fc1[expert], kept).flatten(1).t(), out=dx[rows])
            if bias1 is not None:
                grad_bias[expert] = dh[rows].sum(0)
        if kept != x_NH.dtype:
            grad_x[block.rows] = dx
    return grad_x, grad1, grad2, grad_weight, grad_bias


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


@_blocked.register_fake
def _(x_NH, fc1, fc2, counts_E, weight_N, bias1, kind):
    return torch.empty_like(x_NH), x_NH.new_empty(x_NH.shape[0], *fc1.shape[2:])


@_blocked_backward.register_fake
def _(grad_NH, x_NH, fc1, fc2, counts_E, weight_N, bias1, h_NGF, kind):
    weight = x_NH.new_empty(0) if weight_N is None else torch.empty_like(weight_N)
    bias = x_NH.new_empty(0) if bias1 is None else torch.empty_like(bias1)
    return torch.empty_like(x_NH), torch.empty_like(fc1), torch.empty_like(fc2), weight, bias


def _save(ctx, inputs, output) -> None:
    x_NH, fc1, fc2, counts_E, weight_N, bias1, ctx.kind = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_NH, fc1, fc2, counts_E, weight_N, bias1, output[1])


def _backward(ctx, grad_NH: Tensor, _: Tensor):
    x_NH, fc1, fc2, counts_E, weight_N, bias1, h = ctx.saved_tensors
    grads = _blocked_backward(grad_NH.contiguous(), x_NH, fc1, fc2, counts_E, weight_N, bias1, h, ctx.kind)
    weight, bias = (None if given is None else g for given, g in zip((weight_N, bias1), grads[3:], strict=True))
    return *grads[:3], None, weight, bias, None


_blocked.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.moesys.expert_ffn)
def _flops(x_shape, fc1_shape, fc2_shape, *args, out_shape=None, **kwargs) -> int:
    """So that torch's FlopCounterMode sees through the operation."""
    return 2 * x_shape[0] * x_shape[1] * fc2_shape[1] * (fc1_shape[2] + 1)


@register_flop_formula(torch.ops.moesys.expert_ffn_backward)
def _flops_backward(grad_shape, x_shape, fc1_shape, fc2_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x_shape, fc1_shape, fc2_shape)
