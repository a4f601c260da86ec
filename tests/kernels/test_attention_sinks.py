"""Attention with sinks: torch's fused kernel, with its log-sum-exp, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from moesys.kernels import attention_sinks


def gradients(function, inputs, target):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad((out * target).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "last queries", "masked"])
def test_the_fused_kernel_computes_the_definition(kind, dtype, device):
    torch.manual_seed(0)
    queries, keys = (19, 19) if kind == "causal" else (7, 19)
    q, target = (torch.randn(2, 3, queries, 8).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 3, keys, 8).to(dtype) for _ in range(2))
    sinks = torch.tensor([-2.0, 0.5, 6.0]).to(dtype)
    mask = None
    if kind == "masked":
        mask = torch.rand(2, 1, queries, keys) < 0.5
        mask[..., 0] = True
    q, k, v, sinks, target = (x.to(device) for x in (q, k, v, sinks, target))
    mask = mask if mask is None else mask.to(device)
    found = gradients(lambda *x: attention_sinks.attend_with_sinks(*x, mask, scale=0.4), (q, k, v, sinks), target)
    wide = [x.double() for x in (q, k, v, sinks)]
    expected = gradients(lambda *x: attention_sinks.reference(*x, mask, scale=0.4), wide, target.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5 if device == "cpu" else 1e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_sink_far_below_changes_nothing_and_one_far_above_takes_all():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = attention_sinks.attend_with_sinks(q, k, v, torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(found[:, 0], plain[:, 0])
    assert found[:, 1].abs().max() == 0
