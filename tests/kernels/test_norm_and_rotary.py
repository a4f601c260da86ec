"""The norm and rotary positions with their written-out backward against autograd in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moesys.kernels import layer_norm, rms_norm, rotary


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


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_norm_of_a_stream_that_may_be_narrower_than_its_weights(narrow):
    torch.manual_seed(0)
    wide = torch.promote_types(narrow, torch.float32)
    x, target = torch.randn(2, 5, 12).to(narrow) + 1, torch.randn(2, 5, 12).to(narrow)
    weight, bias = torch.rand(12, dtype=wide), torch.randn(12, dtype=wide)
    found = gradients(lambda *x: layer_norm.layer_norm(*x, 1e-5), (x, weight, bias), target)
    plain = gradients(lambda *x: layer_norm.reference(*x, 1e-5), (x, weight, bias), target)

    def definition(x, w, b):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w + b

    expected = gradients(definition, (x.double(), weight.double(), bias.double()), target.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[narrow]
    for a, b in zip(found + plain, expected * 2, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert [a.dtype for a in found] == [narrow, narrow, wide, wide]


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
        rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4).double(), angles)[None, :, None]
        return torch.cat((rotated.real, rotated.imag), -1)

    expected = gradients(definition, (x.double(),), target.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found + plain, expected * 2, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_in_one_kernel(triton_device, dtype):
    """Of heads that lie apart in memory, of more heads than a program turns at once, and of none."""
    from moesys.kernels.triton import rotary as kernel

    torch.manual_seed(0)
    whole = torch.randn(2, 5, 3, 20, device=triton_device).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (
        whole,
        whole[..., 4:16],
        whole.transpose(1, 2)[:, :, :1],
        torch.randn(1, 2, 1200, 6).to(whole),
        whole[:0],
    ):
        cos, sin = rotary.tables(torch.randn(x.shape[1], x.shape[-1] // 2, device=triton_device, dtype=wide))
        for back, sines in ((False, sin), (True, -sin)):
            found = kernel.rotate(x, cos, sin, back)
            assert found.dtype == dtype and found.is_contiguous()
            tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(found, rotary.reference(x, cos, sines), rtol=tolerance, atol=tolerance)


def test_rotary_forward_and_backward_each_way(device):
    x = torch.randn(2, 5, 3, 8, device=device)
    cos, sin = rotary.tables(torch.randn(5, 4, device=device))
    target = torch.randn_like(x)
    found = gradients(lambda x: rotary.rotate(x, cos, sin), (x,), target)
    for a, b in zip(found, gradients(lambda x: rotary.reference(x, cos, sin), (x,), target), strict=True):
        torch.testing.assert_close(a, b)


def test_rms_norm_is_one_operation_of_torch_on_a_gpu(monkeypatch):
    """Where the types agree: of two, torch would compute step by step."""
    called = []
    monkeypatch.setattr(nn.functional, "rms_norm", lambda x, *given: called.append(x.dtype) or x)
    for dtype in (torch.float32, torch.bfloat16):
        x = SimpleNamespace(is_cuda=True, dtype=dtype)
        rms_norm.rms_norm(x, torch.ones(4, dtype=dtype), 1e-5)
    assert called == [torch.float32, torch.bfloat16]
    with pytest.raises(AttributeError):  # the written-out norm takes no stand-in
        rms_norm.rms_norm(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), torch.ones(4), 1e-5)


def test_torch_s_rms_norm_is_as_near_to_the_truth():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256), torch.rand(256)
    truth = rms_norm.reference(x.double(), weight.double(), 1e-6)
    found = rms_norm.rms_norm(x, weight, 1e-6), nn.functional.rms_norm(x, (256,), weight, 1e-6)
    errors = [(f - truth).abs().max().item() for f in found]
    assert max(errors) < 1e-6
