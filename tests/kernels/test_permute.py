"""Gathering and summing rows against loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.kernels.permute import permute, sort_by_expert, unpermute

FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # interpreted kernels are too slow to shrink an example
    suppress_health_check=list(HealthCheck),
)
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
}


def _sums(rows: Tensor, index: Tensor, offsets: Tensor, weight: Tensor | None) -> Tensor:
    out = torch.zeros(len(offsets) - 1, rows.shape[1], dtype=torch.float64)
    for t, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for a in range(start, end):
            out[t] += rows[index[a]].double() * (1 if weight is None else weight[a].double())
    return out


@st.composite
def bags(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, index, offsets, weights): runs of 0 to 9 rows."""
    sizes = draw(st.one_of(st.lists(st.integers(0, 9), max_size=6), st.just([0, 0]), st.just([1])))
    torch.manual_seed(draw(st.integers(0, 99)))
    hidden, pool = draw(st.sampled_from([1, 3, 16, 40])), draw(st.integers(1, 12))
    rows = torch.randn(pool, hidden).to(draw(st.sampled_from(TYPES)))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return rows, torch.randint(pool, (sum(sizes),)), offsets, torch.rand(sum(sizes))


@FEW
@given(bags())
def test_kernels_equal_loops(triton_device, bag):
    from moesys.kernels.triton.permute import gather, gather_sum, weight_grad

    rows, index, offsets, weight = bag
    on = [x.to(triton_device) for x in bag]
    close = TOLERANCE[rows.dtype]
    assert torch.equal(gather(on[0], on[1]).cpu(), rows[index])
    weighed = gather(on[0], on[1], on[3]).cpu()
    torch.testing.assert_close(weighed, (rows[index].double() * weight.unsqueeze(-1)).to(rows.dtype), **close)
    for w in (None, weight):
        found = gather_sum(*on[:3], None if w is None else on[3])
        assert found.dtype == rows.dtype and found.is_contiguous()
        torch.testing.assert_close(found.cpu().double(), _sums(rows, index, offsets, w), **close)
    tokens = torch.randint(5, index.shape)
    grad = torch.randn(5, rows.shape[1]).to(rows.dtype)
    for i in (index, None):
        source = rows[index] if i is None else rows
        at = None if i is None else i.to(triton_device)
        found = weight_grad(grad.to(triton_device), source.to(triton_device), at, tokens.to(triton_device))
        assert found.dtype == torch.promote_types(rows.dtype, torch.float32)
        expected = (grad[tokens].double() * rows[index].double()).sum(-1)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_kernels_take_rows_wider_than_a_program_and_apart_in_memory(triton_device):
    from moesys.kernels.triton import permute as kernel

    x = torch.randn(3, 2500, device=triton_device)[:, :2100]
    index, offsets = torch.tensor([2, 0, 2, 1, 1], device=triton_device), torch.tensor([0, 4, 5], device=triton_device)
    assert torch.equal(kernel.gather(x, index), x[index])
    expected = _sums(x.cpu(), index.cpu(), offsets.cpu(), None).float()
    torch.testing.assert_close(kernel.gather_sum(x, index, offsets).cpu(), expected)
    found = kernel.weight_grad(x, x, index, index)
    torch.testing.assert_close(found, x.square().sum(-1)[index])


@FEW
@given(st.data())
def test_permute_and_unpermute_equal_float64(device, data):
    tokens, experts = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5))
    each = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    token = torch.arange(tokens).repeat_interleave(torch.tensor(each, dtype=torch.int64))
    expert = torch.randint(experts, token.shape) if data.draw(st.booleans()) else torch.zeros_like(token)
    weight, hidden = torch.rand(len(token)), data.draw(st.integers(1, 20))
    _check(device, torch.randn(tokens, hidden), token, expert, weight, experts, data.draw(st.booleans()))


def _check(device: str, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, experts: int, weighted: bool) -> None:
    """y = Σ weight · rows² of every token, and its gradients."""
    p = sort_by_expert(token.to(device), expert.to(device), len(x), experts)
    order = sorted(range(len(token)), key=lambda a: (expert[a].item(), a))
    assert p.order_A.tolist() == order
    assert p.counts_E.tolist() == torch.bincount(expert, minlength=experts).tolist()
    found = [t.to(device, copy=True).requires_grad_() for t in (x, weight[order])]
    rows = permute(found[0], p)
    assert torch.equal(rows.detach().cpu(), x[token[order]])
    y = unpermute(rows * rows, p, found[1] if weighted else None)
    expected = [t.to(torch.float64, copy=True).requires_grad_() for t in (x, weight)]
    squares = expected[0][token].square() * (expected[1].unsqueeze(-1) if weighted else 1)
    right = torch.stack([squares[token == t].sum(0) for t in range(len(x))]) if len(x) else expected[0].square()
    torch.testing.assert_close(y.detach().cpu().double(), right.detach(), rtol=1e-5, atol=1e-5)
    target = torch.randn(right.shape, dtype=torch.float64)
    (right * target).sum().backward()
    (y * target.to(y)).sum().backward()
    torch.testing.assert_close(found[0].grad.cpu().double(), expected[0].grad, rtol=1e-5, atol=1e-5)
    if weighted:
        torch.testing.assert_close(found[1].grad.cpu().double(), expected[1].grad[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_sums_of_other_types_keep_them(device, dtype):
    token = torch.arange(3, device=device).repeat_interleave(4)
    p = sort_by_expert(token, token.flip(0), 3, 3)
    rows = torch.randn(12, 6, device=device).to(dtype)
    weight = torch.rand(12, device=device)
    found = unpermute(rows, p, weight)
    assert found.dtype == dtype
    expected = torch.zeros(3, 6, device=device, dtype=torch.float64)
    expected.index_add_(0, p.token_A, rows.double() * weight.double().unsqueeze(-1))
    tolerance = TOLERANCE[torch.float32 if dtype == torch.float64 else dtype]
    torch.testing.assert_close(found.double(), expected, **tolerance)


def test_kernels_are_launched_where_their_tensors_are(triton_device, monkeypatch):
    from moesys.kernels.triton.permute import gather, weight_grad

    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: (entered.append(x.shape), device_of(x))[1])
    x, index = torch.randn(4, 3, device=triton_device), torch.arange(4, device=triton_device)
    gather(x, index)
    assert entered == [(4, 3)]
    weight_grad(x, x, None, index)
    assert entered == [(4, 3)] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_kernels_run_on_a_device_that_is_not_the_current_one():
    x, index = torch.randn(4, 3, device="cuda:1"), torch.tensor([2, 0, 2], device="cuda:1")
    p = sort_by_expert(index.sort().values, index, 4, 3)
    assert torch.equal(permute(x, p), x[p.token_A])
