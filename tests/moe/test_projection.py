"""The gate's projection in the precision that it promises, whatever the model's."""

from __future__ import annotations

import pytest
import torch

from moesys.moe.gates import projection
from moesys.moe.gates.projection import GateProjection


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 30])
def test_is_exact_to_float32_or_wider_in_any_number_of_pieces(monkeypatch, tokens, dtype, bias):
    monkeypatch.setattr(projection, "TOKENS", 8)
    torch.manual_seed(0)
    gate = GateProjection(12, 5, bias).to(dtype)
    x = torch.randn(tokens, 12).to(dtype).requires_grad_()
    logits = gate(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert logits.dtype == wide
    target = torch.randn(tokens, 5, dtype=wide)
    grads = torch.autograd.grad((logits * target).sum(), [x, *gate.parameters()])

    exact = [p.detach().double() for p in (x, *gate.parameters())]
    expected = exact[0] @ exact[1].t() + (exact[2] if bias else 0)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)
    formulas = [target.double() @ exact[1], target.double().t() @ exact[0], target.double().sum(0)]
    for found, formula in zip(grads, formulas[: len(grads)], strict=True):
        assert found.dtype == dtype
        # Rounded once, at the end.
        torch.testing.assert_close(found, formula.to(dtype), rtol=max(torch.finfo(dtype).eps, 2e-6), atol=4e-6)
