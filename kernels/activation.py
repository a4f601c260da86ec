"""Activations of experts, multiplied by the routing weight in the same pass.

N rows, G = 2 (gate and linear part) or 1, F inner size. Backward needs h alone: the routing weight multiplies the
activation, not the outputs, so that the experts' outputs are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moesys.kernels.choose import as_type, choose, widened

ALPHA, LIMIT = 1.702, 7.0
"""GPT-OSS's clipped SwiGLU: slope inside the sigmoid, and bounds of both parts."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation `value(g)`, times `linear(u)` if `gated`; each with its backward(gradient, input).

    Functions that end in `_out` write into given memory.
    """

    value: Callable[[Tensor], Tensor]
    value_backward: Callable[[Tensor, Tensor], Tensor]
    gated: bool = False
    linear: Callable[[Tensor], Tensor] | None = None
    linear_backward: Callable[[Tensor, Tensor], Tensor] | None = None
    value_out: Callable[..., Tensor] | None = None
    value_backward_out: Callable[..., Tensor] | None = None

    @property
    def parts(self) -> int:
        """G."""
        return 2 if self.gated else 1


def _quick(g: Tensor) -> Tensor:
    g = g.clamp(max=LIMIT)
    return g * torch.sigmoid(ALPHA * g)


def _quick_backward(grad: Tensor, g: Tensor) -> Tensor:
    inside, g = g <= LIMIT, g.clamp(max=LIMIT)
    s = torch.sigmoid(ALPHA * g)
    return grad * inside * s * (1 + ALPHA * g * (1 - s))


def _shifted(u: Tensor) -> Tensor:
    return u.clamp(-LIMIT, LIMIT) + 1


def _shifted_backward(grad: Tensor, u: Tensor) -> Tensor:
    return grad * (u.abs() <= LIMIT)


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * (2 * functional.relu(x))


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * (x > 0)


KINDS = {
    "swiglu": Activation(
        functional.silu,
        aten.silu_backward,
        gated=True,
        value_out=aten.silu.out,
        value_backward_out=aten.silu_backward.grad_input,
    ),
    "geglu": Activation(functional.gelu, aten.gelu_backward, gated=True, value_out=aten.gelu.out),
    "clipped_swiglu": Activation(_quick, _quick_backward, True, _shifted, _shifted_backward),
    "gelu": Activation(functional.gelu, aten.gelu_backward),
    "relu": Activation(functional.relu, _relu_backward),
    "relu2": Activation(_relu2, _relu2_backward),
}
"""SwiGLU, GeGLU: arXiv 2002.05202; squared ReLU: Primer, arXiv 2109.08668; clipped SwiGLU: GPT-OSS."""


def reference(h_NGF: Tensor, kind: str, weight_N: Tensor | None = None) -> Tensor:
    """`activate` by its definition, differentiable by autograd; float32 or wider inside."""
    k, wide = KINDS[kind], h_NGF.to(torch.promote_types(h_NGF.dtype, torch.float32))
    out = k.value(wide[:, 0])
    if k.gated:
        out = out * (wide[:, 1] if k.linear is None else k.linear(wide[:, 1]))
    if weight_N is not None:
        out = out * weight_N.unsqueeze(-1)
    return out.to(h_NGF.dtype)


def activate(h_NGF: Tensor, kind: str, weight_N: Tensor | None = None) -> Tensor:
    """act(h) · weight: [N, F] in the type of h [N, G, F]; `weight_N` float32 [N] or None for 1."""
    implementation = choose(h_NGF, "activation")
    if implementation == "reference" or (
        implementation == "torch" and torch.compiler.is_compiling()
    ):  # which fuses the definition
        return reference(h_NGF, kind, weight_N)
    return _Activate.apply(h_NGF, weight_N, kind)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NGF, weight_N, kind):  # type: ignore[override]
        ctx.kind = kind
        ctx.save_for_backward(h_NGF, weight_N)
        return activated(h_NGF, kind, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF):  # type: ignore[override]
        h_NGF, weight_N = ctx.saved_tensors
        return *gradients(grad_NF, h_NGF, ctx.kind, weight_N), None


def activated(h_NGF: Tensor, kind: str, weight_N: Tensor | None) -> Tensor:
    """`activate` without autograd."""
    if choose(h_NGF, "activation") == "triton":
        from moesys.kernels.triton import activation as kernel

        return kernel.activate(h_NGF, kind, weight_N)
    return forward(h_NGF, kind, weight_N)


def gradients(grad_NF: Tensor, h_NGF: Tensor, kind: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of h [N, G, F] and of the weight [N], each in its type, None without one; `h_NGF` contiguous."""
    if choose(h_NGF, "activation") == "triton":
        from moesys.kernels.triton import activation as kernel

        return kernel.activate_backward(grad_NF, h_NGF, kind, weight_N)
    wide = torch.promote_types(h_NGF.dtype, torch.float32)
    grad_h, grad_weight = backward(grad_NF.to(wide), h_NGF.to(wide), kind, weight_N)
    return grad_h.to(h_NGF.dtype), grad_weight


def forward(h_NGF: Tensor, kind: str, weight_N: Tensor | None = None, out_NF: Tensor | None = None) -> Tensor:
    """`activated` by torch; may write to `out_NF` of h's type."""
    k, wide = KINDS[kind], as_type(h_NGF, widened(h_NGF.dtype))
    g, *linear = wide.unbind(1)
    out = _value(k, g, out_NF)
    if k.gated:
        out = out.mul_(linear[0] if k.linear is None else k.linear(linear[0]))
    if weight_N is not None:
        out = out.mul_(weight_N.unsqueeze(-1))
    if out.dtype == h_NGF.dtype:
        return out
    return out.to(h_NGF.dtype) if out_NF is None else out_NF.copy_(out)


def backward(grad_NF: Tensor, h_NGF: Tensor, kind: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`gradients` by torch; all of one type, float32 or wider."""
    dh = torch.empty_like(h_NGF)
    recomputed = Recomputed(h_NGF, kind, dh)
    dh[:, 0].copy_(grad_NF)
    along = recomputed.backward()
    if weight_N is None:
        return dh, None
    return dh.mul_(weight_N.to(dh.dtype).view(-1, 1, 1)), along.to(weight_N.dtype)


def _value(k: Activation, g: Tensor, out: Tensor | None) -> Tensor:
    if k.value_out is None or out is None or out.dtype != g.dtype:
        return k.value(g)
    return k.value_out(g, out=out)


class Recomputed:
    """Recomputes an activation for backward, without routing weights, in the memory of its gradient.

    First `inner` [N, F], the activation, stands in `dh[:, 0]`, for the gradient of the matrix that it was
    multiplied with. Then the gradient of `inner` is written there, or given to `backward`, which makes of it that of h.

    Args:
        h_NGF: what was activated; all of one type.
        dh: memory for the gradient of h [N, G, F].
    """

    def __init__(self, h_NGF: Tensor, kind: str, dh: Tensor):
        self.kind, (self.g, *rest), (self.inner, *memory) = KINDS[kind], h_NGF.unbind(1), dh.unbind(1)
        if not self.kind.gated:
            self.value = self.kind.value(self.g)
            self.inner.copy_(self.value)
            return
        # It is kept in the memory of the other part's gradient.
        (self.u,), (self.value,) = rest, memory
        if self.kind.value_out is not None:
            self.kind.value_out(self.g, out=self.value)
        else:
            self.value.copy_(self.kind.value(self.g))
        torch.mul(self.value, self._linear(), out=self.inner)

    def _linear(self) -> Tensor:
        return self.u if self.kind.linear is None else self.kind.linear(self.u)

    def backward(self, grad_NF: Tensor | None = None) -> Tensor:
        """Σ_f gradient · activation [N]; `dh` becomes the gradient of h.

        `grad_NF` is the gradient of `inner`, which this overwrites; by default it stands in `dh[:, 0]`.
        """
        k, d = self.kind, self.inner if grad_NF is None else grad_NF
        if k.gated:
            linear, du = self._linear(), self.value.mul_(d)
            along = torch.linalg.vecdot(du, linear)
            if k.linear_backward is not None:
                du.copy_(k.linear_backward(du, self.u))
            d.mul_(linear)
        else:
            along = torch.linalg.vecdot(d, self.value)
        if k.value_backward_out is not None:
            k.value_backward_out(d, self.g, grad_input=self.inner)
        else:
            self.inner.copy_(k.value_backward(d, self.g))
        return along
