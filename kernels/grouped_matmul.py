"""Matrix products of consecutive groups of rows, each with its own matrix.

`reference` is the definition. `grouped_matmul` chooses by device: on GPU torch's grouped_mm where it is one kernel,
else Triton; on CPU one product per group, which writes into the shared result without copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from moesys.kernels.choose import choose, torch_has_grouped_mm


def reference(x_NK: Tensor, w_GKM: Tensor, rows_per_group: Tensor) -> Tensor:
    """[N, M]: rows of group g (consecutive, `rows_per_group[g]` of them, any may be 0) times w[g]."""
    parts = x_NK.split(rows_per_group.tolist())
    return torch.cat([part @ w for part, w in zip(parts, w_GKM, strict=True)])


# Before torch 2.10 only the private name is there.
torch_grouped_mm: Callable[..., Tensor] = getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm)
"""torch's own grouped product: public since torch 2.10, and the same operation in either case."""


@torch.library.custom_op("moesys::grouped_matmul", mutates_args=())
def _grouped(x_NK: Tensor, w_GKM: Tensor, rows_G: Tensor) -> Tensor:
    out, rows = x_NK.new_empty(x_NK.shape[0], w_GKM.shape[2]), rows_G.tolist()
    for x, w, y in zip(x_NK.split(rows), w_GKM, out.split(rows), strict=True):
        if len(x):
            torch.mm(x, w, out=y)
    return out


@_grouped.register_fake
def _(x_NK: Tensor, w_GKM: Tensor, rows_G: Tensor) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], w_GKM.shape[2])


@torch.library.custom_op("moesys::grouped_matmul_weight_grad", mutates_args=())
def _grouped_weight_grad(x_NK: Tensor, grad_NM: Tensor, rows_G: Tensor) -> Tensor:
    out, rows = x_NK.new_zeros(len(rows_G), x_NK.shape[1], grad_NM.shape[1]), rows_G.tolist()
    for x, grad, y in zip(x_NK.split(rows), grad_NM.split(rows), out, strict=True):
        if len(x):
            torch.mm(x.t(), grad, out=y)
    return out


@_grouped_weight_grad.register_fake
def _(x_NK: Tensor, grad_NM: Tensor, rows_G: Tensor) -> Tensor:
    return x_NK.new_empty(rows_G.shape[0], x_NK.shape[1], grad_NM.shape[1])


def _backward(ctx, grad_NM: Tensor):
    x_NK, w_GKM, rows_G = ctx.saved_tensors
    grad_NM = grad_NM.contiguous()
    grad_x = _grouped(grad_NM, w_GKM.transpose(1, 2), rows_G) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_weight_grad(x_NK, grad_NM, rows_G) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


_grouped.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@register_flop_formula(torch.ops.moesys.grouped_matmul)
def _flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of the operation, for torch's FlopCounterMode."""
    return 2 * x_shape[0] * x_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.moesys.grouped_matmul_weight_grad)
def _flops_grouped_weight_grad(x_shape, grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]


@torch.library.custom_op("moesys::grouped_mm", mutates_args=())
def _grouped_mm(x_NK: Tensor, w_GKM: Tensor, offsets_G1: Tensor) -> Tensor:
    """The product by Triton; registered before Triton is imported, so that selective recomputation can name it."""
    from moesys.kernels.triton.grouped_matmul import grouped_mm

    return grouped_mm(x_NK, w_GKM, offsets_G1)


@torch.library.custom_op("moesys::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(x_NK: Tensor, grad_NM: Tensor, offsets_G1: Tensor) -> Tensor:
    from moesys.kernels.triton.grouped_matmul import grouped_mm_weight_grad

    return grouped_mm_weight_grad(x_NK, grad_NM, offsets_G1)


@_grouped_mm.register_fake
def _(x_NK: Tensor, w_GKM: Tensor, offsets_G1: Tensor) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], w_GKM.shape[2])


@_grouped_mm_weight_grad.register_fake
def _(x_NK: Tensor, grad_NM: Tensor, offsets_G1: Tensor) -> Tensor:
    return x_NK.new_empty(offsets_G1.shape[0] - 1, x_NK.shape[1], grad_NM.shape[1])


def _grouped_mm_backward(ctx, grad_NM: Tensor):
    x_NK, w_GKM, offsets_G1 = ctx.saved_tensors
    grad_x = _grouped_mm(grad_NM, w_GKM.transpose(1, 2), offsets_G1) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_mm_weight_grad(x_NK, grad_NM, offsets_G1) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


_grouped_mm.register_autograd(
    _grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@register_flop_formula(torch.ops.moesys.grouped_mm)
def _flops_grouped_mm(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.moesys.grouped_mm_weight_grad)
def _flops_weight_grad(x_shape, grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]


def grouped_matmul(x_NK: Tensor, w_GKM: Tensor, rows_per_group: Tensor) -> Tensor:
    """`reference`, by the fastest implementation on the device: [N, M].

    Args:
        x_NK: floating [N, K], consecutive rows of each group.
        w_GKM: [G, K, M] in the type of x.
        rows_per_group: int64 [G], sum N, any 0. On GPU its values stay on the device.
    """
    implementation = choose(x_NK, "grouped_matmul", w_GKM)
    if implementation == "reference":
        return reference(x_NK, w_GKM, rows_per_group)
    if implementation == "triton":
        return _grouped_mm(x_NK, w_GKM, starts(rows_per_group))
    if torch_has_grouped_mm(x_NK, w_GKM):
        return _TorchProducts.apply(x_NK, w_GKM, starts(rows_per_group))
    return _grouped(x_NK, w_GKM, rows_per_group)


def starts(rows_per_group: Tensor) -> Tensor:
    """First row of each group, and the end of the last: int32 [G + 1]. Nothing waits for the device."""
    return torch.nn.functional.pad(rows_per_group.cumsum(0, dtype=torch.int32), (1, 0))


def product(x_NK: Tensor, w_GKM: Tensor, starts_G1: Tensor) -> Tensor:
    """`grouped_matmul` without autograd, by the same choice; `starts_G1` from `starts`."""
    if choose(x_NK, "grouped_matmul", w_GKM) == "triton":
        return _grouped_mm(x_NK, w_GKM, starts_G1)
    if torch_has_grouped_mm(x_NK, w_GKM):
        return torch_grouped_mm(x_NK, w_GKM, offs=starts_G1[1:])
    return _grouped(x_NK, w_GKM, starts_G1.diff())


def matrix_gradients(x_NK: Tensor, grad_NM: Tensor, starts_G1: Tensor) -> Tensor:
    """x[rows of g]ᵀ · grad[rows of g] of every group: [G, K, M], zeros for one without rows; without autograd."""
    if choose(x_NK, "grouped_matmul", grad_NM) == "triton":
        return _grouped_mm_weight_grad(x_NK, grad_NM, starts_G1)
    if torch_has_grouped_mm(x_NK, grad_NM):
        return torch_grouped_mm(x_NK.t(), grad_NM, offs=starts_G1[1:])
    return _grouped_weight_grad(x_NK, grad_NM, starts_G1.diff())


class _TorchProducts(torch.autograd.Function):
    """torch's grouped_mm, whose own derivative takes no gradient that is expanded or lies otherwise."""

    @staticmethod
    def forward(ctx, x_NK, w_GKM, starts_G1):  # type: ignore[override]
        ctx.save_for_backward(x_NK, w_GKM, starts_G1)
        return torch_grouped_mm(x_NK, w_GKM, offs=starts_G1[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NM):  # type: ignore[override]
        x_NK, w_GKM, starts_G1 = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        grad_x = product(grad_NM, w_GKM.mT, starts_G1) if ctx.needs_input_grad[0] else None
        grad_w = matrix_gradients(x_NK, grad_NM, starts_G1) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None
