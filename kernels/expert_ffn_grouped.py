"""`expert_ffn` on GPU: the rows of all experts at once, by gathering, grouped products and the fused activation.

For backward it keeps its inputs and the products of fc1, as on CPU. Backward gathers rows and computes inner
activations once more, as DeepSeek-V3 does with SwiGLU (arXiv 2412.19437): one pass over memory in place of up to twice
the kept memory. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import activation
from moesys.kernels.expert_ffn_arguments import Arguments
from moesys.kernels.grouped_matmul import matrix_gradients, product, starts
from moesys.kernels.permute import gather, gather_sum


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Output and h [N, G, F] of the operation `moesys::expert_ffn`."""
    fc1, starts_E1 = args.fc1, starts(args.counts_E)
    h = product(_rows(args.x_TH, args.index_N), fc1.flatten(2), starts_E1).unflatten(1, fc1.shape[2:])
    if args.bias1 is not None:
        h += args.bias1.repeat_interleave(args.counts_E, 0, output_size=len(h))
    y = product(activation.activated(h, args.kind, args.weight_N), args.fc2, starts_E1)
    return _sums(y, args), h


def backward(grad_TH: Tensor, args: Arguments, h_NGF: Tensor, of_fc1: bool, of_fc2: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `moesys::expert_ffn_backward`, None in place of empty ones; `grad_TH` contiguous.

    Frees each intermediate result after its use.
    """
    fc1, fc2, kind, weight_N, starts_E1 = args.fc1, args.fc2, args.kind, args.weight_N, starts(args.counts_E)
    dy = _rows(grad_TH, args.index_N)
    grad2 = matrix_gradients(activation.activated(h_NGF, kind, weight_N), dy, starts_E1) if of_fc2 else None
    d_inner = product(dy, fc2.mT, starts_E1)
    del dy
    dh_NGF, grad_weight = activation.gradients(d_inner, h_NGF, kind, weight_N)
    del d_inner
    dh = dh_NGF.flatten(1)
    grad1 = matrix_gradients(_rows(args.x_TH, args.index_N), dh, starts_E1).view(fc1.shape) if of_fc1 else None
    grad_bias = None if args.bias1 is None else _sums_by_expert(dh, starts_E1).view(args.bias1.shape)
    grad_x = _sums(product(dh, fc1.flatten(2).mT, starts_E1), args)
    return grad_x, grad1, grad2, grad_weight, grad_bias


def _rows(x_TH: Tensor, index_N: Tensor | None) -> Tensor:
    return x_TH if index_N is None else gather(x_TH, index_N)


def _sums(rows_NH: Tensor, args: Arguments) -> Tensor:
    """Each token's sum of rows; the rows themselves where there are no tokens."""
    if args.row_N is None or args.offsets_T1 is None:
        return rows_NH
    return gather_sum(rows_NH, args.row_N, args.offsets_T1, None)


def _sums_by_expert(rows: Tensor, starts_E1: Tensor) -> Tensor:
    """Sums [E, …] of each expert's rows, always in the same order and in float32."""
    return gather_sum(rows, torch.arange(len(rows), device=rows.device), starts_E1, None)
