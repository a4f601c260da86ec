"""What blocks count, compute and keep when they are recomputed, compiled or not."""

from __future__ import annotations

import pytest
import torch

from moesys.config.schema import ModelConfig
from moesys.models.block import Block
from moesys.models.layers import rotary_angles
from moesys.moe import MoELayer
from moesys.parallel.recompute import prepare

MODEL = {
    "hidden": 16,
    "layers": 1,
    "attention": {"heads": 2, "kv_heads": 1},
    "moe": {"experts": 4, "top_k": 2, "ffn_hidden": 8, "balance_loss": 0.02, "bias_rate": 0.1},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_block_that_is_recomputed_counts_once(mode: str, compiled: bool) -> None:
    torch.manual_seed(0)
    block = Block(ModelConfig.model_validate(MODEL), 0)
    prepare(block, mode, compiled, backend="aot_eager")
    for _ in range(2):
        block(torch.randn(2, 8, 16, requires_grad=True), *rotary_angles(torch.arange(8), 8, 1e4)).sum().backward()
    layer = block.ffn
    assert isinstance(layer, MoELayer)
    totals = layer.statistics.take()
    assert totals["load"].sum() == 2 * 16 * 2 and totals["calls"] == 2
    assert layer.gate.load.sum() == 2 * 16 * 2
