"""The gate in every version against its definition in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.kernels.gate import gate

FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # interpreted kernels are too slow to shrink an example
    suppress_health_check=list(HealthCheck),
)
OPTIONS = [(score, normalize) for score in ("softmax", "sigmoid") for normalize in (True, False)]


def _best(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def _expected(logits: Tensor, expert: Tensor, score: str, normalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(weights, probabilities) in float64, differentiable."""
    e = torch.exp(logits - logits.max(-1, keepdim=True).values.detach())
    probabilities = e / e.sum(-1, keepdim=True) if score == "softmax" else 1 / (1 + torch.exp(-logits))
    weight = torch.stack([p[i] for p, i in zip(probabilities, expert, strict=True)])
    if normalize:
        weight = weight / (weight.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0))
    return weight * scale, probabilities


def _check(device: str, logits: Tensor, k: int, score: str, normalize: bool, scale: float = 1.0) -> None:
    tokens, experts = logits.shape
    x = logits.to(device, copy=True).requires_grad_()
    weight, expert, probabilities, load = gate(x, k, score, normalize, scale)
    chosen = torch.tensor([_best(row, k) for row in logits.tolist()])
    assert expert.dtype == load.dtype == torch.int64
    assert torch.equal(expert.cpu(), chosen)
    assert torch.equal(load.cpu(), torch.bincount(chosen.flatten(), minlength=experts))
    wide = logits.detach().to(torch.float64, copy=True).requires_grad_()
    expected = _expected(wide, chosen, score, normalize, scale)
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if x.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    targets = torch.randn(tokens, k).double(), torch.randn(tokens, experts).double()
    for found, right in zip((weight, probabilities), expected, strict=True):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.detach().cpu().double(), right.detach(), **tolerance)
    sum((out * t).sum() for out, t in zip(expected, targets, strict=True)).backward()
    ours = zip((weight, probabilities), targets, strict=True)
    sum((out * t.to(out)).sum() for out, t in ours).backward()
    assert x.grad is not None and wide.grad is not None
    tolerance = {"rtol": 1e-4, "atol": 3e-6} if x.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(x.grad.cpu().double(), wide.grad, **tolerance)


@FEW
@given(st.data())
def test_equals_float64(device, data):
    experts = data.draw(st.integers(1, 70))
    k = data.draw(st.one_of(st.integers(1, min(experts, 8)), st.just(min(experts, 12))))
    score, normalize = data.draw(st.sampled_from(OPTIONS))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(data.draw(st.integers(1, 80)), experts) * data.draw(st.sampled_from([0.1, 1, 8]))
    _check(device, logits, k, score, normalize, data.draw(st.sampled_from([1, 1.0, 2.5])))


@pytest.mark.parametrize(("score", "normalize"), OPTIONS)
def test_float64_stays_float64(device, score, normalize):
    _check(device, torch.randn(5, 6, dtype=torch.float64), 2, score, normalize, 0.3)


@pytest.mark.parametrize("experts", [1, 8, 33])
def test_of_equal_logits_the_lowest_experts_are_chosen(device, experts):
    k = min(experts, 4)
    _check(device, torch.zeros(3, experts), k, "softmax", True)
    _check(device, torch.randint(0, 2, (7, experts)).float(), k, "sigmoid", True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_experts_may_be_masked_by_infinity(device, score):
    logits = torch.randn(4, 6, device=device)
    logits[:, 1::2] = -math.inf
    weight, expert, probabilities, _ = gate(logits, 3, score, True)
    assert (expert % 2 == 0).all() and (probabilities[:, 1::2] == 0).all()
    torch.testing.assert_close(weight.sum(-1), torch.ones(4, device=device))
    _, expert, _, load = gate(logits, 5, score, True)  # two of the masked ones must be taken, the lowest
    assert expert[:, 3:].tolist() == [[1, 3]] * 4 and load.sum() == 20


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, under Triton's interpreter
def test_nan_chooses_experts_that_exist(device):
    _, expert, _, load = gate(torch.full((3, 5), math.nan, device=device), 2)
    assert expert.tolist() == [[0, 1]] * 3 and load.tolist() == [3, 3, 0, 0, 0]


def test_no_tokens(device):
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    weight, expert, probabilities, load = gate(logits, 2)
    assert weight.shape == expert.shape == (0, 2) and probabilities.shape == (0, 5) and load.tolist() == [0] * 5
    weight.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("which", [0, 2])
def test_either_gradient_alone(device, which):
    logits = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x: gate(x, 2, "softmax", True, 2.0)[which], logits)


def test_narrow_logits_are_computed_in_float32(device):
    logits = torch.randn(6, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    found = gate(logits, 2)
    assert found.weight_Tk.dtype == found.probabilities_TE.dtype == torch.float32
    torch.testing.assert_close(found.weight_Tk, gate(logits.detach().float(), 2).weight_Tk)
    found.weight_Tk[:, 0].sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_logits_need_not_be_contiguous(device):
    logits = torch.randn(8, 5, device=device).t()
    for found, expected in zip(gate(logits, 3), gate(logits.contiguous(), 3), strict=True):
        assert torch.equal(found, expected)


def test_compiles_whole(device):
    logits = torch.randn(6, 8, device=device)
    compiled = torch.compile(lambda x: gate(x, 2, "sigmoid"), backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(logits), gate(logits, 2, "sigmoid"), strict=True):
        torch.testing.assert_close(found, expected)
