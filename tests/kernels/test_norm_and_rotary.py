"""The norm and rotary positions with their written-out backward against autograd in float64."""

import pytest
import torch

from moesys.kernels import rms_norm, rotary


def gradients(function, inputs, target):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad((out * target).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    torch.manual_seed(0)
    x, weight, target = torch.randn(2, 5, 12).to(dtype), torch.rand(12).to(dtype), torch.randn(2, 5, 12).to(dtype)
    found = gradients(lambda x, w: rms_norm.rms_norm(x, w, 1e-5), (x, weight), target)

    def definition(x, w):
        return x / (x.pow(2).sum(-1, keepdim=True) / 12 + 1e-5).sqrt() * w

    expected = gradients(definition, (x.double(), weight.double()), target.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_is_multiplication_by_complex_numbers(dtype):
    torch.manual_seed(0)
    x, target = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(2, 5, 3, 8).to(dtype)
    angles = torch.randn(5, 4, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = rotary.tables(angles.to(wide))
    found = gradients(lambda x: rotary.rotate(x, cos, sin), (x,), target)
    plain = gradients(lambda x: rotary.reference(x, cos, sin), (x,), target)

    def definition(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4).double(), angles)[None, :, None]
        return torch.cat((turned.real, turned.imag), -1)

    expected = gradients(definition, (x.double(),), target.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found + plain, expected * 2, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
