"""All kernels of an MoE layer together, compiled as one graph, against the plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.kernels import choose
from moesys.kernels.expert_ffn import expert_ffn
from moesys.kernels.gate import gate
from moesys.kernels.permute import permute, sort_by_expert, unpermute


def _layer(x_TH: Tensor, logits_TE: Tensor, fc1_EHGF: Tensor, fc2_EFH: Tensor) -> Tensor:
    result = gate(logits_TE, 2)
    token_A = torch.arange(len(x_TH), device=x_TH.device).repeat_interleave(2)
    p = sort_by_expert(token_A, result.expert_Tk.flatten(), len(x_TH), len(fc1_EHGF))
    weight_A = result.weight_Tk.flatten().index_select(0, p.order_A)
    return unpermute(expert_ffn(permute(x_TH, p), fc1_EHGF, fc2_EFH, p.counts_E, "swiglu", weight_A), p)


def _in_one(x_TH: Tensor, logits_TE: Tensor, fc1_EHGF: Tensor, fc2_EFH: Tensor) -> Tensor:
    result = gate(logits_TE, 2)
    token_A = torch.arange(len(x_TH), device=x_TH.device).repeat_interleave(2)
    p = sort_by_expert(token_A, result.expert_Tk.flatten(), len(x_TH), len(fc1_EHGF))
    weight_A = result.weight_Tk.flatten().index_select(0, p.order_A)
    return expert_ffn(x_TH, fc1_EHGF, fc2_EFH, p.counts_E, "swiglu", weight_A, None, p)


@pytest.mark.parametrize("layer", [_layer, _in_one])
def test_a_layer_compiles_whole_and_equals_the_reference(fast_device, layer, monkeypatch):
    torch.manual_seed(0)
    shapes = ((6, 8), (6, 5), (5, 8, 2, 3), (5, 3, 8))
    inputs = [torch.randn(shape, device=fast_device, requires_grad=True) for shape in shapes]
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    grads = torch.autograd.grad(found.square().sum(), inputs)
    monkeypatch.setenv(choose.VARIABLE, "reference")
    choose.forget()
    expected = _layer(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for found_grad, right in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(found_grad, right, rtol=1e-4, atol=1e-4)
