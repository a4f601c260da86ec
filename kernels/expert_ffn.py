"""The feed-forward of all experts of a layer as one operation.

T tokens, N rows sorted by expert, E experts with counts_E rows of each, H hidden, G · F inner (G = 2
with a gated activation). A CPU computes experts one by one, on a core each (`cpu.expert_ffn_blocked`), a GPU all
together (`expert_ffn_grouped`). Both keep only the inputs and the products of fc1 for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from moesys.kernels import activation
from moesys.kernels import expert_ffn_grouped as grouped
from moesys.kernels import grouped_matmul as products
from moesys.kernels import permute as permutation
from moesys.kernels.choose import as_type, choose
from moesys.kernels.cpu import expert_ffn_blocked as blocked
from moesys.kernels.expert_ffn_arguments import Arguments
from moesys.kernels.permute import Permutation


def reference(
    x_TH: Tensor,
    fc1_EHGF: Tensor,
    fc2_EFH: Tensor,
    counts_E: Tensor,
    kind: str = "swiglu",
    weight_N: Tensor | None = None,
    bias1_EGF: Tensor | None = None,
    p: Permutation | None = None,
) -> Tensor:
    """`expert_ffn` by its definition."""
    rows = x_TH if p is None else permutation.reference(x_TH, p)
    h = products.reference(rows, fc1_EHGF.flatten(2), counts_E).unflatten(1, fc1_EHGF.shape[2:])
    if bias1_EGF is not None:
        h = h + bias1_EGF.repeat_interleave(counts_E, 0)
    out = products.reference(activation.reference(h, kind, weight_N), fc2_EFH, counts_E)
    return out if p is None else permutation.reference_unpermute(out, p)


def expert_ffn(
    x_TH: Tensor,
    fc1_EHGF: Tensor,
    fc2_EFH: Tensor,
    counts_E: Tensor,
    kind: str = "swiglu",
    weight_N: Tensor | None = None,
    bias1_EGF: Tensor | None = None,
    p: Permutation | None = None,
) -> Tensor:
    """`(act(row · fc1 + bias1) · weight) · fc2`, each row with its expert's weights.

    Without `p`, x are the rows [N, H] sorted by expert, and so is the result. With it they are tokens
    [T, H], whose rows `p` names, and the result [T, H] sums each token's rows. Computed in the type of x, which
    weights and bias may be wider than; `counts_E` int64 [E], sum N, any 0; `weight_N` float32 (or wider), the
    routing weights, None for 1; `kind` as in `moesys.kernels.activation`.
    """
    if choose(x_TH, "expert_ffn") == "reference":
        fc1_EHGF, fc2_EFH = fc1_EHGF.to(x_TH.dtype), fc2_EFH.to(x_TH.dtype)
        bias1_EGF = None if bias1_EGF is None else bias1_EGF.to(x_TH.dtype)
        return reference(x_TH, fc1_EHGF, fc2_EFH, counts_E, kind, weight_N, bias1_EGF, p)
    index = row = offsets = None
    if p is not None:
        index = p.token_A
        if not _in_blocks(x_TH):  # blocks add to their tokens, and need neither
            row, offsets = p.row_A, p.offsets_T1
    return _ExpertFFN.apply(x_TH, fc1_EHGF, fc2_EFH, counts_E, weight_N, bias1_EGF, index, row, offsets, kind)


def _in_blocks(x: Tensor) -> bool:
    """Whether experts run in blocks on CPU rather than all together."""
    return not x.is_cuda and choose(x, "expert_ffn") == "torch"


_LIBRARY = torch.library.Library("moesys", "FRAGMENT")
_LIBRARY.define(
    "expert_ffn(Tensor x, Tensor fc1, Tensor fc2, Tensor counts, Tensor? weight, Tensor? bias1, Tensor? index, "
    "Tensor? row, Tensor? offsets, str kind) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "expert_ffn_backward(Tensor grad, Tensor x, Tensor fc1, Tensor fc2, Tensor counts, Tensor? weight, Tensor? bias1, "
    "Tensor? index, Tensor? row, Tensor? offsets, str kind, Tensor h, bool of_fc1, bool of_fc2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*inputs) -> tuple[Tensor, Tensor]:
    """Output, in the shape of x, and h [N, G, F], for the inputs of `Arguments`."""
    args = Arguments(*inputs)
    return (blocked if _in_blocks(args.x_TH) else grouped).forward(args)


def _backward(grad_TH: Tensor, *inputs) -> tuple[Tensor, ...]:
    """Gradients of x, fc1, fc2, weight and bias1, from the inputs of `Arguments`, h, `of_fc1` and `of_fc2`.

    Those of weight and bias1 are empty without these inputs, those of fc1 and fc2 if `of_fc1` or `of_fc2` is false.
    """
    *args, h_NGF, of_fc1, of_fc2 = inputs
    implementation = blocked if _in_blocks(args[0]) else grouped
    return _with_empty(implementation.backward(grad_TH.contiguous(), Arguments(*args), h_NGF, of_fc1, of_fc2), grad_TH)


def _with_empty(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The tensors with an empty one in place of each None, which an operation cannot return."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("expert_ffn", _forward, _device)
    _LIBRARY.impl("expert_ffn_backward", _backward, _device)


@torch.library.register_fake("moesys::expert_ffn")
def _(*inputs):
    args = Arguments(*inputs)
    return _fresh(args.x_TH), args.x_TH.new_empty(args.rows, *args.fc1.shape[2:])


@torch.library.register_fake("moesys::expert_ffn_backward")
def _(grad_TH, *inputs):
    *inputs, _, of_fc1, of_fc2 = inputs
    args = Arguments(*inputs)
    asked = (args.x_TH, args.fc1 if of_fc1 else None, args.fc2 if of_fc2 else None, args.weight_N, args.bias1)
    return _with_empty([None if t is None else _fresh(t) for t in asked], grad_TH)


def _fresh(x: Tensor) -> Tensor:
    """A new tensor of the shape of x, contiguous as results are."""
    return x.new_empty(x.shape)


class _ExpertFFN(torch.autograd.Function):
    """The derivative of the operation; registered with the operation it would cost more than small products.

    Forward and backward each cast wider weights, so that no narrow copy is kept between them.
    """

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[override]
        *tensors, ctx.kind = inputs
        out, h = torch.ops.moesys.expert_ffn(*_cast(tensors), ctx.kind)
        ctx.save_for_backward(*tensors, h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):  # type: ignore[override]
        _, of_fc1, of_fc2, _, of_weight, of_bias1, *_ = ctx.needs_input_grad
        *tensors, h = ctx.saved_tensors
        grads = torch.ops.moesys.expert_ffn_backward(grad_TH, *_cast(tensors), ctx.kind, h, of_fc1, of_fc2)
        asked = (True, of_fc1, of_fc2, of_weight, of_bias1)
        args = (tensors[0], tensors[1], tensors[2], tensors[4], tensors[5])
        x, fc1, fc2, weight, bias1 = (
            as_type(g, t.dtype) if a and t is not None else None for a, t, g in zip(asked, args, grads, strict=True)
        )
        return x, fc1, fc2, None, weight, bias1, None, None, None, None


def _cast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs of `Arguments` but the kind, with fc1, fc2 and bias1 in the type of x."""
    x, fc1, fc2, bias1 = tensors[0], tensors[1], tensors[2], tensors[5]
    assert x is not None and fc1 is not None and fc2 is not None
    if fc1.dtype == fc2.dtype == x.dtype and (bias1 is None or bias1.dtype == x.dtype):
        return list(tensors)
    return [t if t is None or i not in (1, 2, 5) else as_type(t, x.dtype) for i, t in enumerate(tensors)]


@register_flop_formula(torch.ops.moesys.expert_ffn)
def _flops(x_shape, fc1_shape, fc2_shape, counts_shape, weight, bias, index, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of the operation, for torch's FlopCounterMode."""
    rows = x_shape[0] if index is None else index[0]
    return 2 * rows * x_shape[1] * fc2_shape[1] * (fc1_shape[2] + 1)


@register_flop_formula(torch.ops.moesys.expert_ffn_backward)
def _flops_backward(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    of_fc1, of_fc2 = shapes[-2:]
    _, hidden, parts, inner = shapes[1]
    rows = shapes[-3][0]
    return 2 * rows * hidden * inner * (parts * (1 + of_fc1) + 1 + of_fc2)


PRODUCTS = (
    torch.ops.moesys.grouped_matmul.default,
    torch.ops.moesys.grouped_mm.default,
    torch.ops.moesys.expert_ffn.default,
)
"""Operations whose results are products; selective recomputation keeps them."""
