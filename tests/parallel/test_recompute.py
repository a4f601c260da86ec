"""Recomputed and compiled blocks count what passes once."""

from __future__ import annotations

import pytest
import torch

from moesys.moe import MoELayer
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.moe.losses import Balance
from moesys.parallel.recompute import wrap


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_compiled_layer_that_is_recomputed_counts_once(mode: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(TopKGate(16, 4, 2, bias_rate=0.1, balance=Balance(balance=0.02)), Experts(4, 16, 8))
    block = wrap(layer, mode)
    block.compile(backend="aot_eager")
    for _ in range(2):
        block(torch.randn(2, 8, 16, requires_grad=True)).sum().backward()
    totals = layer.statistics.take()
    assert totals["load"].sum() == 2 * 16 * 2 and totals["calls"] == 2
    assert layer.gate.load.sum() == 2 * 16 * 2
