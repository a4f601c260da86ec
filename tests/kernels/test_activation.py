"""Activations against their formulas in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.kernels.activation import KINDS, activate

FEW = settings(
    max_examples=14,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # interpreted kernels are too slow to shrink an example
    suppress_health_check=list(HealthCheck),
)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _normal(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / 2**0.5)


def _formula(h: Tensor, kind: str) -> Tensor:
    g, u = h[:, 0], h[:, -1]
    if kind == "clipped_swiglu":
        g, u = torch.where(g > 7, 7.0, g), torch.where(u > 7, 7.0, torch.where(u < -7, -7.0, u))
        return (u + 1) * g / (1 + torch.exp(-1.702 * g))
    return {
        "swiglu": lambda: g / (1 + torch.exp(-g)) * u,
        "geglu": lambda: g * _normal(g) * u,
        "gelu": lambda: g * _normal(g),
        "relu": lambda: torch.where(g > 0, g, 0.0),
        "relu2": lambda: torch.where(g > 0, g, 0.0) ** 2,
    }[kind]()


def _check(device: str, h: Tensor, weight: Tensor | None, kind: str) -> None:
    x = h.to(device, copy=True).requires_grad_()
    w = None if weight is None else weight.to(device, copy=True).requires_grad_()
    out = activate(x, kind, w)
    assert out.dtype == h.dtype and out.shape == (h.shape[0], h.shape[2])
    x64 = h.to(torch.float64, copy=True).requires_grad_()
    w64 = None if weight is None else weight.to(torch.float64, copy=True).requires_grad_()
    right = _formula(x64, kind) * (1 if w64 is None else w64.unsqueeze(-1))
    close = {"rtol": TOLERANCE[h.dtype], "atol": TOLERANCE[h.dtype]}
    torch.testing.assert_close(out.detach().cpu().double(), right.detach(), **close)
    target = torch.randn(right.shape).to(h.dtype)
    (right * target.double()).sum().backward()
    out.backward(target.to(device))
    assert x.grad is not None and x64.grad is not None and x.grad.dtype == h.dtype
    torch.testing.assert_close(x.grad.cpu().double(), x64.grad, **close)
    if w is not None and w64 is not None:
        assert w.grad is not None and w.grad.dtype == torch.float32
        torch.testing.assert_close(w.grad.cpu().double(), w64.grad, rtol=1e-4, atol=1e-4 * h.shape[2])


@FEW
@given(st.data())
def test_equals_float64(device, data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    rows, width = data.draw(st.integers(0, 20)), data.draw(st.sampled_from([1, 5, 16, 37]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    h = (torch.randn(rows, KINDS[kind].parts, width) * data.draw(st.sampled_from([1, 6]))).to(dtype)
    _check(device, h, torch.rand(rows) if data.draw(st.booleans()) else None, kind)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_with_a_weight(device, kind):
    _check(device, torch.randn(3, KINDS[kind].parts, 9) * 6, torch.rand(3), kind)
    _check(device, torch.randn(2, KINDS[kind].parts, 4, dtype=torch.float64), None, kind)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nan_is_not_hidden(device, kind):
    assert activate(torch.full((1, KINDS[kind].parts, 2), float("nan"), device=device), kind).isnan().all()


def test_a_second_derivative_is_refused(fast_device):
    h = torch.randn(3, 2, 4, device=fast_device, requires_grad=True)
    (grad,) = torch.autograd.grad(activate(h, "swiglu").square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_wider_than_a_program(device):
    _check(device, torch.randn(2, 2, 1100), torch.rand(2), "swiglu")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kernels_equal_the_formula(triton_device, kind):
    from moesys.kernels.triton.activation import activate as kernel
    from moesys.kernels.triton.activation import activate_backward

    h, weight, grad = torch.randn(5, KINDS[kind].parts, 7) * 5, torch.rand(5), torch.randn(5, 7)
    x64, w64 = h.double().requires_grad_(), weight.double().requires_grad_()
    right = _formula(x64, kind) * w64.unsqueeze(-1)
    right.backward(grad.double())
    on = [x.to(triton_device) for x in (h, weight, grad)]
    torch.testing.assert_close(kernel(on[0], kind, on[1]).cpu(), right.detach().float(), rtol=1e-5, atol=1e-5)
    grad_h, grad_weight = activate_backward(on[2], on[0], kind, on[1])
    torch.testing.assert_close(grad_h.cpu(), x64.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_weight.cpu(), w64.grad.float(), rtol=1e-5, atol=1e-4)
    grad_h, grad_weight = activate_backward(on[2], on[0], kind)
    assert grad_weight is None
