"""Experts of every activation, with and without biases, against a loop over rows in float64."""

import math

import pytest
import torch
from torch import Tensor

from moesys.kernels.permute import sort_by_expert
from moesys.moe.experts import Experts

E, H, F, T = 4, 12, 10, 9


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def clipped(g: Tensor, u: Tensor) -> Tensor:
    g, u = torch.where(g > 7, 7.0, g), torch.where(u.abs() > 7, 7 * u.sign(), u)
    return g * sigmoid(1.702 * g) * (u + 1)


ACTIVATIONS = {
    "swiglu": lambda g, u: g * sigmoid(g) * u,
    "geglu": lambda g, u: gelu(g) * u,
    "clipped_swiglu": clipped,
    "gelu": gelu,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x, 0.0) ** 2,
}


def by_loop(experts: Experts, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, e, w in zip(token.tolist(), expert.tolist(), weight, strict=True):
        h = torch.einsum("h,hgf->gf", x[t], experts.fc1[e])
        if experts.fc1_bias is not None:
            h = h + experts.fc1_bias[e]
        y = ACTIVATIONS[experts.activation](*h) @ experts.fc2[e]
        if experts.fc2_bias is not None:
            y = y + experts.fc2_bias[e]
        out = out.index_add(0, torch.tensor([t]), (w * y)[None])
    return out


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(activation, bias, by_token):
    torch.manual_seed(0)
    experts = Experts(E, H, F, activation, bias).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)  # so large that the clipped activation clips
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    # Expert 2 gets nothing, token 3 neither.
    token = torch.tensor([t for t in range(T) if t != 3]).repeat_interleave(2)
    expert = torch.tensor([0, 1, 3, 1]).repeat(4)
    weight = torch.rand(len(token), dtype=torch.float64, requires_grad=True)
    p = sort_by_expert(token, expert, T, E)
    if by_token:
        out = experts(x, p.counts_E, weight[p.order_A], p)
    else:
        rows = experts(x[p.token_A], p.counts_E, weight[p.order_A])
        out = torch.zeros_like(x).index_add(0, p.token_A, rows)
    expected = by_loop(experts, x, token, expert, weight)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    target, inputs = torch.randn_like(x), [x, weight, *experts.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((out * target).sum(), inputs),
        torch.autograd.grad((expected * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_devices_that_share_an_expert_share_its_output_bias():
    """Slices of the inner size and of the output bias: their outputs add up to the whole expert's."""
    torch.manual_seed(0)
    whole = Experts(E, H, F, "clipped_swiglu", bias=True).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    parts = []
    for rank in range(2):
        part = Experts(E, H, F // 2, "clipped_swiglu", bias=True).double()
        inner, outer = slice(rank * F // 2, (rank + 1) * F // 2), slice(rank * H // 2, (rank + 1) * H // 2)
        part.fc1.data, part.fc2.data = whole.fc1.data[..., inner], whole.fc2.data[:, inner]
        part.fc1_bias.data, part.fc2_bias.data = whole.fc1_bias.data[..., inner], whole.fc2_bias.data[:, outer]
        part.fc2_bias_start = rank * H // 2
        parts.append(part)
    x, counts, weight = torch.randn(7, H, dtype=torch.float64), torch.tensor([3, 0, 2, 2]), torch.rand(7).double()
    torch.testing.assert_close(sum(part(x, counts, weight) for part in parts), whole(x, counts, weight))
