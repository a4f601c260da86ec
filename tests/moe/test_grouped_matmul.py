"""Grouped matrix products against the plain definition, in float64."""

import pytest
import torch

from moesys.kernels.grouped_matmul import grouped_matmul, reference


@pytest.mark.parametrize("rows", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0], [1, 1, 1, 1]])
def test_forward_and_backward_equal_the_reference(rows):
    torch.manual_seed(0)
    counts = torch.tensor(rows)
    x = torch.randn(sum(rows), 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randn(sum(rows), 7, dtype=torch.float64)
    grads = []
    for function in (grouped_matmul, reference):
        x.grad = w.grad = None
        out = function(x, w, counts)
        (out * target).sum().backward()
        grads.append((out.detach(), x.grad, w.grad if w.grad is not None else torch.zeros_like(w)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


def test_expanded_gradients_are_accepted():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    grouped_matmul(x, w, torch.tensor([1, 3])).sum().backward()
    torch.testing.assert_close(w.grad[0], x[:1].detach().T @ torch.ones(1, 5))
