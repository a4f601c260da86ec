"""Grouped products against products of each group in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesys.kernels import grouped_matmul as module
from moesys.kernels.grouped_matmul import grouped_matmul

FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # interpreted kernels are too slow to shrink an example
    suppress_health_check=list(HealthCheck),
)
COUNTS = st.one_of(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from([[0, 0, 0], [0, 41, 0], [1], [1, 1, 1, 1], [16, 16], [17, 0, 15], [0, 33]]),
)
TYPES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _products(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([part @ w[g] for g, part in enumerate(x.double().split(counts))])


def _draw(data: st.DataObject, outer: int | None = None) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """(counts, x, w, gradient of the output), of one type."""
    counts, dtype = data.draw(COUNTS), data.draw(st.sampled_from(sorted(TYPES, key=str)))
    inner = data.draw(st.sampled_from([1, 7, 16, 35]))
    outer = outer or data.draw(st.sampled_from([1, 9, 16, 33]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, w = torch.randn(sum(counts), inner), torch.randn(len(counts), inner, outer)
    return counts, x.to(dtype), w.to(dtype), torch.randn(sum(counts), outer).to(dtype)


@FEW
@given(st.data())
def test_kernels_equal_float64(triton_device, data):
    from moesys.kernels.triton.grouped_matmul import grouped_mm, grouped_mm_weight_grad

    counts, *tensors = _draw(data)
    x, w, grad = (t.to(triton_device) for t in tensors)
    integers = data.draw(st.sampled_from([torch.int32, torch.int64]))
    offsets = torch.tensor([0, *counts], device=triton_device).cumsum(0).to(integers)
    x64, w64, grad64 = (t.double() for t in tensors)
    close = {"rtol": TYPES[x.dtype], "atol": TYPES[x.dtype]}
    expected = _products(x64, w64, counts)
    torch.testing.assert_close(grouped_mm(x, w, offsets).cpu().double(), expected, **close)
    expected = _products(grad64, w64.transpose(1, 2), counts)
    torch.testing.assert_close(grouped_mm(grad, w.transpose(1, 2), offsets).cpu().double(), expected, **close)
    parts = zip(x64.split(counts), grad64.split(counts), strict=True)
    expected = torch.stack([a.T @ b for a, b in parts])
    found = grouped_mm_weight_grad(x, grad, offsets)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.cpu().double(), expected, **close)


def test_kernels_in_float64_and_apart_in_memory(triton_device):
    from moesys.kernels.triton.grouped_matmul import grouped_mm, grouped_mm_weight_grad

    if triton_device == "cuda":
        pytest.skip("float64 is never given to Triton on CUDA")
    wide, w = torch.randn(20, 30, dtype=torch.float64), torch.randn(2, 10, 5, dtype=torch.float64)
    x, offsets = wide[:, 3::2][:, :10], torch.tensor([0, 18, 20])
    torch.testing.assert_close(grouped_mm(x, w, offsets), _products(x, w, [18, 2]))
    grad = torch.randn(5, 20, dtype=torch.float64).t()
    expected = torch.stack([x[:18].T @ grad[:18], x[18:].T @ grad[18:]])
    torch.testing.assert_close(grouped_mm_weight_grad(x, grad, offsets), expected)


def test_floating_point_operations_are_counted(device):
    x, w = torch.randn(6, 4, device=device, requires_grad=True), torch.randn(2, 4, 3, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        grouped_matmul(x, w, torch.tensor([2, 4], device=device)).sum().backward()
    assert flops.get_total_flops() == 3 * (2 * 6 * 4 * 3)


def test_many_groups_and_bands(triton_device):
    from moesys.kernels.triton.grouped_matmul import grouped_mm

    counts = [1, 0, 17, 3] * 8
    x, w = torch.randn(sum(counts), 5), torch.randn(len(counts), 5, 18)
    offsets = torch.tensor([0, *counts], device=triton_device).cumsum(0)
    found = grouped_mm(x.to(triton_device), w.to(triton_device), offsets).cpu()
    torch.testing.assert_close(found, _products(x, w.double(), counts).float())


@FEW
@given(st.data())
def test_forward_and_backward_equal_float64(device, data):
    counts, *tensors = _draw(data)
    x, w = (t.to(device, copy=True).requires_grad_() for t in tensors[:2])
    x64, w64 = (t.to(torch.float64, copy=True).requires_grad_() for t in tensors[:2])
    close = {"rtol": TYPES[x.dtype], "atol": TYPES[x.dtype]}
    out, expected = grouped_matmul(x, w, torch.tensor(counts, device=device)), _products(x64, w64, counts)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **close)
    expected.backward(tensors[2].double())
    out.backward(tensors[2].to(device))
    for found, right in ((x, x64), (w, w64)):
        assert found.grad is not None and right.grad is not None
        torch.testing.assert_close(found.grad.cpu().double(), right.grad, **close)


def test_torchs_products_take_gradients_that_are_expanded(monkeypatch):
    """As on Hopper: what torch's grouped_mm refuses there it refuses on CPU, too."""
    monkeypatch.setattr(module, "choose", lambda *given: "torch")
    monkeypatch.setattr(module, "torch_has_grouped_mm", lambda x, w: True)
    x, w = torch.randn(11, 8, requires_grad=True), torch.randn(3, 8, 12, requires_grad=True)
    grads = torch.autograd.grad(grouped_matmul(x, w, torch.tensor([7, 0, 4])).sum(), (x, w))
    expected = torch.autograd.grad(_products(x, w.double(), [7, 0, 4]).sum(), (x, w))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
