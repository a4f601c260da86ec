"""Products of consecutive groups of rows, each group with its own matrix, and the matrices' gradients.

N rows sorted by group, G groups, K inner and M outer size. Groups may have any sizes: the device alone
knows them. So the grid has as many tiles of rows as there can be at most, every program finds its group
from the offsets, and the few left over end at once. As in MegaBlocks (arXiv 2211.15841), no row is padded
or dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.choose import interpreted
from moesys.kernels.triton.launch import on_its_device
from moesys.kernels.triton.permute import wide

BAND = 8
"""Tiles of rows that go through all columns together, so that both factors stay in the second-level cache."""


def _configs() -> list[triton.Config]:
    """Tiles to try, by rows x columns. All sum over tiles of one depth, so results do not depend on the choice."""
    if interpreted():
        return [triton.Config({"BLOCK_A": 16, "BLOCK_B": 16})]
    tiles = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (32, 64, 4, 4))
    return [triton.Config({"BLOCK_A": a, "BLOCK_B": b}, num_warps=w, num_stages=s) for a, b, w, s in tiles]


@triton.jit
def _multiply(a, b, total, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # bfloat16 is bare bits there
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.autotune(configs=_configs(), key=["inner", "outer", "usual"])
@triton.jit(do_not_specialize=["usual"])
def _rows_kernel(
    x_NK, w_GKM, offsets_G1, out_NM, groups, inner, outer, usual,
    x_n, x_k, w_g, w_k, w_m,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(outer, BLOCK_B)
    tiles = tl.num_programs(0) // across
    band = tl.program_id(0) // (BAND * across)
    height = min(tiles - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * across)
    tile, column = band * BAND + within % height, within // height

    g_G = tl.arange(0, GROUPS)
    start_G = tl.load(offsets_G1 + g_G, mask=g_G < groups, other=0)
    end_G = tl.load(offsets_G1 + g_G + 1, mask=g_G < groups, other=0)
    tiles_G = (end_G - start_G + BLOCK_A - 1) // BLOCK_A
    last_G = tl.cumsum(tiles_G, axis=0)
    group = tl.sum((last_G <= tile).to(tl.int32), axis=0)
    if group < groups:
        first_tile = tl.sum(tl.where(g_G == group, last_G - tiles_G, 0), axis=0)
        start = tl.sum(tl.where(g_G == group, start_G, 0), axis=0).to(tl.int64)
        end = tl.sum(tl.where(g_G == group, end_G, 0), axis=0).to(tl.int64)
        n_A = start + (tile - first_tile) * BLOCK_A + tl.arange(0, BLOCK_A)
        m_B = column * BLOCK_B + tl.arange(0, BLOCK_B)
        # Rows past the end are read from the first and not stored; columns are masked, to be read together.
        x_A1 = x_NK + tl.where(n_A < end, n_A, start)[:, None] * x_n
        w_1B = w_GKM + group.to(tl.int64) * w_g + m_B.to(tl.int64)[None, :] * w_m
        column_1B = (m_B < outer)[None, :]
        total = tl.zeros((BLOCK_A, BLOCK_B), WIDE)
        for first in range(0, inner, DEPTH):
            k = (first + tl.arange(0, DEPTH)).to(tl.int64)
            if EVEN:
                x = tl.load(x_A1 + k[None, :] * x_k)
                w = tl.load(w_1B + k[:, None] * w_k, mask=column_1B, other=0.0)
            else:
                x = tl.load(x_A1 + k[None, :] * x_k, mask=(k < inner)[None, :], other=0.0)
                w = tl.load(w_1B + k[:, None] * w_k, mask=(k < inner)[:, None] & column_1B, other=0.0)
            total = _multiply(x, w, total, INTERPRETED)
        stored = (n_A < end)[:, None] & column_1B
        at = out_NM + n_A[:, None] * outer + m_B[None, :]
        tl.store(at, total.to(out_NM.dtype.element_ty), mask=stored)


@triton.autotune(configs=_configs(), key=["inner", "outer", "usual"])
@triton.jit(do_not_specialize=["usual"])
def _matrices_kernel(
    x_NK, grad_NM, offsets_G1, out_GKM, inner, outer, usual, x_n, x_k, grad_n, grad_m,
    WIDE: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(inner, BLOCK_A), tl.cdiv(outer, BLOCK_B)
    group = tl.program_id(0) // (down * across)
    within = tl.program_id(0) % (down * across)
    k_A = (within % down) * BLOCK_A + tl.arange(0, BLOCK_A)
    m_B = (within // down) * BLOCK_B + tl.arange(0, BLOCK_B)
    start, end = tl.load(offsets_G1 + group).to(tl.int64), tl.load(offsets_G1 + group + 1).to(tl.int64)
    total = tl.zeros((BLOCK_A, BLOCK_B), WIDE)
    for first in range(start, end, DEPTH):
        n = first + tl.arange(0, DEPTH)
        x_at = x_NK + n[None, :] * x_n + k_A.to(tl.int64)[:, None] * x_k
        grad_at = grad_NM + n[:, None] * grad_n + m_B.to(tl.int64)[None, :] * grad_m
        x = tl.load(x_at, mask=(k_A < inner)[:, None] & (n < end)[None, :], other=0.0)
        grad = tl.load(grad_at, mask=(n < end)[:, None] & (m_B < outer)[None, :], other=0.0)
        total = _multiply(x, grad, total, INTERPRETED)
    stored = (k_A < inner)[:, None] & (m_B < outer)[None, :]
    at = out_GKM + (group.to(tl.int64) * inner + k_A[:, None]) * outer + m_B[None, :]
    tl.store(at, total.to(out_GKM.dtype.element_ty), mask=stored)


@on_its_device
def grouped_mm(x_NK: Tensor, w_GKM: Tensor, offsets_G1: Tensor) -> Tensor:
    """Rows offsets[g] : offsets[g + 1] of x times w[g]: [N, M] in the type of x.

    Sums in float32 (or wider), float32 factors without TF32. Nothing waits for the device.

    Args:
        x_NK: float32, bfloat16 or float16 [N, K] of any strides.
        w_GKM: [G, K, M] in the type of x, of any strides: for the gradient of x give the gradient of the
            output and w.transpose(1, 2).
        offsets_G1: int32 or int64 [G + 1] on the device, ascending from 0 to N.
    """
    rows, groups, (inner, outer) = len(x_NK), len(w_GKM), w_GKM.shape[1:]
    out = x_NK.new_empty(rows, outer)
    if not inner:
        return out.zero_()
    if out.numel():
        depth = _depth(x_NK)

        def grid(meta: dict[str, int]) -> tuple[int]:
            # Each group has at most one tile that is not full.
            return ((rows // meta["BLOCK_A"] + min(groups, rows)) * triton.cdiv(outer, meta["BLOCK_B"]),)

        _rows_kernel[grid](
            x_NK, w_GKM, offsets_G1.contiguous(), out, groups, inner, outer, _usual(rows, groups),
            *x_NK.stride(), *w_GKM.stride(),
            wide(x_NK), depth, inner % depth == 0, triton.next_power_of_2(groups), BAND, interpreted(),
        )  # fmt: skip
    return out


@on_its_device
def grouped_mm_weight_grad(x_NK: Tensor, grad_NM: Tensor, offsets_G1: Tensor) -> Tensor:
    """x[rows of g]ᵀ · grad[rows of g] for every group: [G, K, M] in the type of x, zeros for an empty group.

    Args:
        x_NK: float32, bfloat16 or float16 [N, K] of any strides.
        grad_NM: [N, M] in the type of x, of any strides.
        offsets_G1: as for `grouped_mm`.
    """
    rows, groups, inner, outer = len(x_NK), len(offsets_G1) - 1, x_NK.shape[1], grad_NM.shape[1]
    out = x_NK.new_empty(groups, inner, outer)
    if out.numel():

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (groups * triton.cdiv(inner, meta["BLOCK_A"]) * triton.cdiv(outer, meta["BLOCK_B"]),)

        _matrices_kernel[grid](
            x_NK, grad_NM, offsets_G1.contiguous(), out, inner, outer, _usual(rows, groups),
            *x_NK.stride(), *grad_NM.stride(), wide(x_NK), _depth(x_NK), interpreted(),
        )  # fmt: skip
    return out


def _depth(x: Tensor) -> int:
    """Terms of the sum that are loaded at once."""
    return 16 if interpreted() else 128 // x.element_size()


def _usual(rows: int, groups: int) -> int:
    """About how many rows a group has: tiles are tuned anew only when that doubles, not in every step."""
    return triton.next_power_of_2(triton.cdiv(max(rows, 1), groups))
