"""The loss in chunks: its numbers are torch's, and no float32 copy of all logits is ever there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.parallel import loss
from moesys.parallel.loss import TokenLoss

BATCH, SEQUENCE, VOCAB, TOKENS = 2, 12, 50, 40
CHUNK, ALL = 5 * VOCAB, loss.LOSS_CHUNK


def whole(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """The definition, on float32 logits of all tokens."""
    wide = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels_BS.flatten(), reduction="sum") / TOKENS


def some(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE))
    labels[0, 2:9] = loss.IGNORED  # a whole chunk, and parts of two
    return 3 * torch.randn(BATCH, SEQUENCE, VOCAB).to(dtype), labels


def run(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    found = function(leaf * 1, labels)
    (found * 0.5).backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, CHUNK, ALL])
def test_numbers_are_those_of_all_logits_at_once(dtype, chunk, monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK", chunk)
    (found, grad), (expected, expected_grad) = (run(f, *some(dtype)) for f in (TokenLoss(TOKENS), whole))
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)
    assert torch.equal(grad, expected_grad)
    assert chunk < ALL or torch.equal(found, expected)
    with torch.no_grad():
        logits, labels = some(dtype)
        assert torch.equal(TokenLoss(TOKENS)(logits, labels), found) and torch.equal(logits, some(dtype)[0])


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made, rather than gave a view of."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_logits_become_their_gradient(monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK", CHUNK)
    logits, labels = some(torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    stream = leaf * 1
    with Allocations() as made:
        found = TokenLoss(TOKENS)(stream, labels)
        grad = torch.autograd.grad(found, stream)[0]
    assert grad.data_ptr() == stream.data_ptr()
    assert made.largest <= 4 * CHUNK < logits.nbytes
    with Allocations() as made:
        run(whole, logits, labels)
    assert made.largest >= 2 * logits.nbytes  # such a copy would be seen


def test_backward_runs_once():
    logits, labels = some(torch.float32)
    found = TokenLoss(TOKENS)(logits.requires_grad_() * 1, labels)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        found.backward()
