"""What blocks count, compute and keep when they are recomputed, compiled or not."""

from __future__ import annotations

import pytest
import torch

from moesys.config.schema import ModelConfig
from moesys.models.block import Block, PredictionBlock
from moesys.models.rotary import rotary_angles
from moesys.moe import MoELayer
from moesys.parallel.recompute import prepare

# torch.compile's own, where a graph starts with what another one computed
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")

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


def _results(mode: str, compiled: bool, kind: type[Block] = Block) -> list[torch.Tensor]:
    """Output and gradients of a block, in float64; one of multi-token prediction has two inputs."""
    torch.manual_seed(0)
    block = kind(ModelConfig.model_validate(MODEL), 0).double()
    prepare(block, mode, compiled, backend="aot_eager")
    inputs = [torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind is not Block))]
    tables = (t.double() for t in rotary_angles(torch.arange(8), 8, 1e4))
    out = block(inputs[0], *tables, None, *inputs[1:])
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [*inputs, *block.parameters()])]


RUNS = [(mode, compiled, Block) for mode in ("none", "full", "selective") for compiled in (False, True)]
RUNS += [("full", False, PredictionBlock), ("selective", True, PredictionBlock)]


@pytest.mark.parametrize(("mode", "compiled", "kind"), RUNS)
def test_a_block_computes_the_same_however_it_is_run(mode: str, compiled: bool, kind: type[Block]) -> None:
    for found, expected in zip(_results(mode, compiled, kind), _results("none", False, kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
