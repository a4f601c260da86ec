"""Dense gating against its formula."""

from __future__ import annotations

import torch
from gate_cases import assert_same_gradients, feed_forward, layer, vectors

from moesys.moe.gates.dense import DenseGate

H, E = 16, 5


def test_dense_is_the_softmax_mixture_of_all_experts():
    built = layer(DenseGate(H, E, z_loss=0.01))
    x, target = vectors(7), vectors(7, seed=2)
    out = built(x[None])[0]
    logits = x @ built.gate.projection.weight.T
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = sum(shares[:, e, None] * feed_forward(built.experts, e, x) for e in range(E))
    torch.testing.assert_close(out, expected)
    z = 0.01 * logits.exp().sum(-1).log().square().mean()
    assert_same_gradients(built, (out * target).sum(), (expected * target).sum() + z)
    totals = built.statistics.take()
    assert totals["load"].tolist() == [7] * E
    torch.testing.assert_close(totals["z"], z.detach())
