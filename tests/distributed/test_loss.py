"""The loss of logits whose vocabulary is split over the tensor axis, in real processes."""

from __future__ import annotations

import torch
from losses import TOKENS, some, split
from standing import Standing
from torch import nn

from moesys.parallel import loss


def test_is_the_loss_of_whole_logits_by_one_collective():
    standing = Standing(2)
    try:
        ranks = standing.ask(split)
    finally:
        standing.close()
    for name, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        logits, labels = some(dtype)
        wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        expected = nn.functional.cross_entropy(wide, labels, ignore_index=loss.IGNORED, reduction="sum") / TOKENS
        (grad,) = torch.autograd.grad(expected, wide)
        rtol = {"float64": 1e-13, "bfloat16": 1e-5}[name]
        for found in ranks:
            torch.testing.assert_close(found[name]["loss"], expected, rtol=rtol, atol=0)
            assert found[name]["loss"] == found[name]["evaluated"]
            # A log-sum-exp and a logit of each token, of both ranks.
            size = 2 * labels.numel() * wide.element_size()
            assert found[name]["travelled"] == [("all_gather", 2 * size)]
        whole = torch.cat([found[name]["grad"] for found in ranks], 1)
        torch.testing.assert_close(whole, grad.to(dtype), rtol=1e-12 if name == "float64" else 2**-7, atol=1e-15)
