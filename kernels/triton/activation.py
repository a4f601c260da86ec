"""Activations of experts times the routing weight, forward and backward in one pass each.

N rows, G = 2 (gate and linear part) or 1, F inner size. Arithmetic in float32, or in float64 of float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesys.kernels.triton.launch import on_its_device
from moesys.kernels.triton.permute import wide

ELEMENTS, WIDTH = 2048, 1024
"""Elements of the output that a program works on at once, and most of them in one row."""


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _value_and_slope(g, KIND: tl.constexpr):
    """(activation, its derivative) at g; comparisons are such that NaN stays NaN."""
    if KIND == "swiglu":
        s = _sigmoid(g)
        value, slope = g * s, s * (1 + g * (1 - s))
    elif KIND == "clipped_swiglu":
        clipped = tl.where(g > 7, 7, g)
        s = _sigmoid(1.702 * clipped)
        value = clipped * s
        slope = tl.where(g > 7, 0, s * (1 + 1.702 * clipped * (1 - s)))
    elif KIND == "geglu" or KIND == "gelu":
        below = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        value, slope = g * below, below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif KIND == "relu":
        value, slope = tl.where(g <= 0, 0, g), tl.where(g <= 0, 0.0, 1.0).to(g.dtype)
    else:
        tl.static_assert(KIND == "relu2")
        positive = tl.where(g <= 0, 0, g)
        value, slope = positive * positive, 2 * positive
    return value, slope


@triton.jit
def _linear_and_slope(u, KIND: tl.constexpr):
    """(linear part, its derivative) at u."""
    slope = tl.full(u.shape, 1, u.dtype)
    if KIND == "clipped_swiglu":
        slope = tl.where((u > 7) | (u < -7), 0, slope)
        u = tl.where(u > 7, 7, tl.where(u < -7, -7, u)) + 1
    return u, slope


@triton.jit
def _forward_kernel(
    h_NGF, weight_N, out_NF, rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n_B1 = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    f_1F = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    row = n_B1 < rows
    inside = row & (f_1F < width)
    at = h_NGF + n_B1 * (width * (2 if GATED else 1)) + f_1F
    out, _ = _value_and_slope(tl.load(at, mask=inside, other=0.0).to(WIDE), KIND)
    if GATED:
        u, _ = _linear_and_slope(tl.load(at + width, mask=inside, other=0.0).to(WIDE), KIND)
        out *= u
    if WEIGHTED:
        out *= tl.load(weight_N + n_B1, mask=row, other=0.0).to(WIDE)
    tl.store(out_NF + n_B1 * width + f_1F, out.to(out_NF.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_NF, h_NGF, weight_N, grad_h_NGF, grad_weight_N, rows, width,
    KIND: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n_B1 = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    row = n_B1 < rows
    total_BF = tl.zeros((BLOCK_N, BLOCK_F), WIDE)
    if WEIGHTED:
        weight_B1 = tl.load(weight_N + n_B1, mask=row, other=0.0).to(WIDE)
    # A program has whole rows, for the weight's gradient is a sum over one.
    for first in range(0, width, BLOCK_F):
        f_1F = (first + tl.arange(0, BLOCK_F))[None, :]
        inside = row & (f_1F < width)
        at = n_B1 * (width * (2 if GATED else 1)) + f_1F
        grad = tl.load(grad_NF + n_B1 * width + f_1F, mask=inside, other=0.0).to(WIDE)
        value, slope = _value_and_slope(tl.load(h_NGF + at, mask=inside, other=0.0).to(WIDE), KIND)
        if GATED:
            u, u_slope = _linear_and_slope(tl.load(h_NGF + at + width, mask=inside, other=0.0).to(WIDE), KIND)
            u_slope *= value
            slope *= u
            value *= u
        if WEIGHTED:
            total_BF += grad * value
            grad *= weight_B1
        if GATED:
            tl.store(grad_h_NGF + at + width, (grad * u_slope).to(grad_h_NGF.dtype.element_ty), mask=inside)
        tl.store(grad_h_NGF + at, (grad * slope).to(grad_h_NGF.dtype.element_ty), mask=inside)
    if WEIGHTED:
        grad_weight_B1 = tl.sum(total_BF, axis=1, keep_dims=True)
        tl.store(grad_weight_N + n_B1, grad_weight_B1.to(grad_weight_N.dtype.element_ty), mask=row)


@torch.library.custom_op("moesys::activate", mutates_args=())
@on_its_device
def activate(h_NGF: Tensor, kind: str, weight_N: Tensor | None = None) -> Tensor:
    """act(h) · weight: [N, F] in the type of h.

    Args:
        h_NGF: floating [N, G, F]; h[:, 0] is the gate and h[:, 1] the linear part where G = 2.
        kind: as in `moesys.kernels.activation`; G = 2 for the gated ones, else 1.
        weight_N: floating [N], or None for 1.
    """
    h_NGF = h_NGF.contiguous()
    rows, parts, width = h_NGF.shape
    out = h_NGF.new_empty(rows, width)
    if out.numel():
        block_n, block_f = _blocks(width)
        _forward_kernel[(triton.cdiv(rows, block_n), triton.cdiv(width, block_f))](
            h_NGF, None if weight_N is None else weight_N.contiguous(), out, rows, width,
            kind, parts == 2, weight_N is not None, wide(h_NGF), block_n, block_f,
        )  # fmt: skip
    return out


def activate_backward(
    grad_NF: Tensor, h_NGF: Tensor, kind: str, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of h [N, G, F] in its type, gradient of the weight [N] in its type or None)."""
    grad_h_NGF, grad_weight_N = _backward(grad_NF, h_NGF, kind, weight_N)
    return grad_h_NGF, None if weight_N is None else grad_weight_N


@torch.library.custom_op("moesys::activate_backward", mutates_args=())
@on_its_device
def _backward(grad_NF: Tensor, h_NGF: Tensor, kind: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of the weight is empty without one: an operation cannot return None."""
    grad_NF, h_NGF = grad_NF.contiguous(), h_NGF.contiguous()
    rows, parts, width = h_NGF.shape
    grad_h_NGF = torch.empty_like(h_NGF)
    grad_weight_N = h_NGF.new_empty(0) if weight_N is None else weight_N.new_zeros(rows)
    if grad_h_NGF.numel():
        block_n, block_f = _blocks(width)
        _backward_kernel[(triton.cdiv(rows, block_n),)](
            grad_NF, h_NGF, None if weight_N is None else weight_N.contiguous(), grad_h_NGF, grad_weight_N, rows, width,
            kind, parts == 2, weight_N is not None, wide(h_NGF), block_n, block_f,
        )  # fmt: skip
    return grad_h_NGF, grad_weight_N


@activate.register_fake
def _(h_NGF, kind, weight_N=None):
    return h_NGF.new_empty(h_NGF.shape[0], h_NGF.shape[2])


@_backward.register_fake
def _(grad_NF, h_NGF, kind, weight_N):
    grad_weight_N = h_NGF.new_empty(0) if weight_N is None else weight_N.new_empty(h_NGF.shape[0])
    return h_NGF.new_empty(h_NGF.shape), grad_weight_N


def _blocks(width: int) -> tuple[int, int]:
    """(rows, columns) of a program."""
    block_f = min(WIDTH, triton.next_power_of_2(width))
    return min(ELEMENTS // block_f, 16), block_f
