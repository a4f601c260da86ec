"""Losses that enter backward where they arise."""

import pytest
import torch
from torch import Tensor

from moesys.moe.routing import attach_loss


def with_a_break(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    z = attach_loss(y, 3 * w.square().sum())
    torch._dynamo.graph_break()  # as where the sizes of what travels are read
    return z.sum() + y.sum()


# torch.compile's own, where a graph starts with what another one computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_differentiates_the_loss_too(compiled):
    x, w = torch.randn(5), torch.randn(5, requires_grad=True)
    f = torch.compile(with_a_break, backend="aot_eager") if compiled else with_a_break
    out = f(x, w)
    torch.testing.assert_close(out, 2 * (x * w).sum())
    out.backward()
    torch.testing.assert_close(w.grad, 2 * x + 6 * w.detach())
