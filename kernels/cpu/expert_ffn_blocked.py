"""`expert_ffn` on CPU by blocks of experts, each on a core of its own where that balances, else one after another.

A block gathers its rows, passes them through both products while they are in the cache, and adds its results to their
tokens. `expert_ffn_small` is for layers with few rows in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesys.kernels import activation
from moesys.kernels.choose import as_type
from moesys.kernels.cpu import expert_ffn_small as small
from moesys.kernels.cpu import memory_pool
from moesys.kernels.cpu.workers import Finish, each
from moesys.kernels.expert_ffn_arguments import Arguments

BLOCK = 2**18
"""Elements of the inner activation of one block: they fit a core's second-level cache."""


@dataclass(frozen=True)
class _Block:
    """Consecutive experts that one core computes together."""

    experts: slice
    rows: slice
    counts: list[int]


def _blocks(counts: list[int], width: int) -> Iterator[_Block]:
    """All experts in blocks whose inner activations fill the cache; a larger expert is a block alone."""
    first = start = end = 0
    for expert, count in enumerate([*counts, None]):
        if count is None or (end > start and (end + count - start) * width > BLOCK):
            if end > start:
                yield _Block(slice(first, expert), slice(start, end), counts[first:expert])
            first, start = expert, end
        end += count or 0


@cache
def _slow_bfloat16() -> bool:
    """Whether products of bfloat16 are emulated: then float32 is several times faster, and no less exact."""
    return not torch.cpu._is_avx512_bf16_supported()


def working_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which products of `dtype` are computed on this CPU."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) and _slow_bfloat16() else dtype


def _widened(w: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` in the type to compute in; a transposed matrix stays one."""
    if w.dtype == dtype:
        return w
    transposed = w.mT.is_contiguous() and not w.is_contiguous()
    return _widened(w.mT, dtype).mT if transposed else memory_pool.empty(w.shape, dtype).copy_(w)


def _target(out: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` itself where it has the type to compute in, else memory of its shape."""
    return out if out.dtype == dtype else memory_pool.empty(out.shape, dtype)


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Output and h [N, G, F] of the operation `moesys::expert_ffn`."""
    if small.fits(args, BLOCK):
        return small.forward(args)
    x_TH, fc1, fc2, counts_E, weight_N, bias1, index_N, *_, kind = args
    wide = working_type(x_TH.dtype)
    out = memory_pool.empty(x_TH.shape, x_TH.dtype) if index_N is None else memory_pool.zeros(x_TH.shape, wide)
    h = memory_pool.empty((args.rows, *fc1.shape[2:]), x_TH.dtype)
    blocks = list(_blocks(counts_E.tolist(), fc2.shape[1]))
    hs, indices, weights = (_by_block(t, blocks) for t in (h, index_N, weight_N))
    w1, w2 = fc1.flatten(2).unbind(), fc2.unbind()

    def work(b: int) -> Finish:
        block = blocks[b]
        x = _rows(x_TH, block, indices[b], wide)
        hidden = _target(hs[b], wide)
        _products(x, w1[block.experts], hidden.flatten(1), block.counts)
        if bias1 is not None:
            _add_bias(hidden, bias1[block.experts], block.counts)
        inner = activation.forward(hidden, kind, weights[b], memory_pool.empty((len(x), fc2.shape[1]), wide))
        y = _products(inner, w2[block.experts], _results(out, block, indices[b], x), block.counts)
        if wide != x_TH.dtype:
            hs[b].copy_(hidden)
        return lambda: _give(out, y, block, indices[b])

    each(range(len(blocks)), _sizes(blocks, fc1), work)
    return as_type(out, x_TH.dtype), h


def _by_block(x: Tensor | None, blocks: list[_Block]) -> Sequence[Any]:
    """The rows of each block, as views that are made here: worker threads would wait for each other's Python."""
    return [None] * len(blocks) if x is None else x.split([sum(block.counts) for block in blocks])


def _sizes(blocks: list[_Block], fc1: Tensor) -> list[int]:
    """Multiply-adds of each block, forward."""
    hidden, parts, inner = fc1.shape[1:]
    return [sum(block.counts) * hidden * inner * (parts + 1) for block in blocks]


def _rows(x: Tensor, block: _Block, index: Tensor | None, dtype: torch.dtype, spare: Tensor | None = None) -> Tensor:
    """The rows of a block, in the type to compute in: not to be changed, unless `index` gathers them.

    `spare` [rows, H] is memory of that type which they may be gathered to.
    """
    if index is None:
        return as_type(x[block.rows], dtype)
    shape = len(index), x.shape[1]
    spare = memory_pool.empty(shape, dtype) if spare is None else spare
    if x.dtype == dtype:
        return torch.index_select(x, 0, index, out=spare)
    return spare.copy_(torch.index_select(x, 0, index, out=memory_pool.empty(shape, x.dtype)))


def _results(out: Tensor, block: _Block, index: Tensor | None, spare: Tensor) -> Tensor:
    """Memory for the results of a block's rows: the rows of `out`, if they are given and of `spare`'s type.

    `spare` is what `_rows` returned, used no more.
    """
    return _target(out[block.rows], spare.dtype) if index is None else spare


def _give(out: Tensor, y: Tensor, block: _Block, index: Tensor | None) -> None:
    """Put a block's results, from `_results`, where they belong: in their rows, or on top of their tokens."""
    if index is not None:
        out.index_add_(0, index, y)
    elif y.dtype != out.dtype:
        out[block.rows] = y


def _not_zero(weight: Tensor) -> Tensor:
    """Routing weights to divide by: a zero becomes so small that only its own gradient sees it."""
    return weight.masked_fill(weight == 0, 1e-30)


def _products(x: Tensor, w: Sequence[Tensor], out: Tensor, counts: list[int]) -> Tensor:
    """out = x · w, each expert's rows with its own matrix [K, M]."""
    for x_e, w_e, out_e in zip(_by_expert(x, counts), w, _by_expert(out, counts), strict=True):
        if len(x_e):
            torch.mm(x_e, _widened(w_e, x.dtype), out=out_e)
    return out


def _weight_grads(x: Tensor, grad: Tensor, out: Sequence[Tensor], counts: list[int]) -> None:
    """out = xᵀ · grad of each expert; zeros for those without rows."""
    for x_e, grad_e, out_e in zip(_by_expert(x, counts), _by_expert(grad, counts), out, strict=True):
        if not len(x_e):
            out_e.zero_()
        elif out_e.dtype == x.dtype:
            torch.mm(x_e.t(), grad_e, out=out_e)
        else:
            wide = memory_pool.empty(out_e.shape, x.dtype)
            out_e.copy_(torch.mm(x_e.t(), grad_e, out=wide))


def _by_expert(x: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return x.split(counts) if len(counts) > 1 else (x,)


def _add_bias(h: Tensor, bias_EGF: Tensor, counts: list[int]) -> None:
    for h_e, bias in zip(h.split(counts), bias_EGF.unbind(), strict=True):
        h_e += bias


def backward(grad_TH: Tensor, args: Arguments, h_NGF: Tensor, of_fc1: bool, of_fc2: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `moesys::expert_ffn_backward`, None in place of empty ones; `grad_TH` contiguous."""
    if args.weight_N is not None:
        args = args._replace(weight_N=_not_zero(args.weight_N))
    if small.fits(args, BLOCK):
        return small.backward(grad_TH, args, h_NGF, of_fc1, of_fc2)
    x_TH, fc1, fc2, counts_E, weight_N, bias1, index_N, *_, kind = args
    wide, counts = working_type(x_TH.dtype), counts_E.tolist()
    grad_x = memory_pool.empty(x_TH.shape, x_TH.dtype) if index_N is None else memory_pool.zeros(x_TH.shape, wide)
    # Experts between two blocks have no rows: no block reaches their gradients.
    fresh = memory_pool.empty if all(counts) else memory_pool.zeros
    grad1 = fresh(fc1.shape, fc1.dtype) if of_fc1 else None
    grad2 = fresh(fc2.shape, fc2.dtype) if of_fc2 else None
    grad_weight_N = None if weight_N is None else weight_N.new_empty(weight_N.shape)
    grad_bias = None if bias1 is None else bias1.new_zeros(bias1.shape)

    blocks = list(_blocks(counts, fc2.shape[1]))
    hs, indices, weights, grad_weights = (_by_block(t, blocks) for t in (h_NGF, index_N, weight_N, grad_weight_N))
    w1, w2 = fc1.flatten(2).mT.unbind(), fc2.mT.unbind()
    grads1, grads2 = (None if g is None else g.flatten(2).unbind() for g in (grad1, grad2))

    def work(b: int) -> Finish:
        block, weight, index = blocks[b], weights[b], indices[b]
        experts, h = block.experts, _widened(hs[b], wide)
        dy = _rows(grad_TH, block, index, wide)
        if weight is not None:
            out = dy if index is not None else memory_pool.empty(dy.shape, wide)
            dy = torch.mul(dy, weight.to(wide).unsqueeze(-1), out=out)
        dh = memory_pool.empty(h.shape, wide)
        recomputed = activation.Recomputed(h, kind, dh)
        if grads2 is not None:
            _weight_grads(recomputed.inner, dy, grads2[experts], block.counts)
        _products(dy, w2[experts], recomputed.inner, block.counts)
        along = recomputed.backward()
        if weight is not None:
            torch.div(along, weight, out=grad_weights[b])
        del h, recomputed
        if grads1 is not None:
            x = _rows(x_TH, block, index, wide, dy)
            _weight_grads(x, dh.flatten(1), grads1[experts], block.counts)
        if grad_bias is not None:
            for out, part in zip(grad_bias[experts].unbind(), _by_expert(dh, block.counts), strict=True):
                out += part.sum(0)
        dx = _products(dh.flatten(1), w1[experts], _results(grad_x, block, index, dy), block.counts)
        return lambda: _give(grad_x, dx, block, index)

    each(range(len(blocks)), _sizes(blocks, fc1), work)
    return as_type(grad_x, x_TH.dtype), grad1, grad2, grad_weight_N, grad_bias
