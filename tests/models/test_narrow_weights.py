"""Wider weights leave no copy of themselves for backward, however many micro-batches are on their way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesys.config.schema import ModelConfig
from moesys.models.block import Block
from moesys.models.layers import Linear
from moesys.models.rotary import rotary_angles
from moesys.parallel.recompute import prepare

MODEL = {
    "hidden": 64, "layers": 1, "attention": {"heads": 2, "kv_heads": 1},
    "moe": {"experts": 8, "top_k": 2, "ffn_hidden": 64, "shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"lora_rank": 2}], ids=["experts", "low rank"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_no_copy_of_a_weight_is_kept_per_micro_batch(mode: str, change: dict) -> None:
    block = Block(ModelConfig.model_validate(MODEL | {"moe": MODEL["moe"] | change}), 0)
    prepare(block, mode, False)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    shapes = {tuple(p.shape) for p in block.parameters() if p.ndim > 1}
    copies = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        same = tuple(x.shape) in shapes or tuple(x.mT.shape if x.ndim > 1 else ()) in shapes
        if same and x.untyped_storage().data_ptr() not in weights:
            copies.append(tuple(x.shape))
        return x

    outs = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for _ in range(3):
            x = torch.randn(1, 7, 64, dtype=torch.bfloat16, requires_grad=True)
            outs.append(block(x, *rotary_angles(torch.arange(7), 32, 1e4)))
    assert outs[0].dtype == torch.bfloat16
    # Of the gate, whose arithmetic is float32, there is nothing to cast; of two small factors a copy is kept.
    assert not [c for c in copies if 2 not in c], copies
    torch.stack(outs).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize("bias", [False, True])
def test_a_narrow_product_and_its_gradients_are_those_of_a_cast_weight(bias: bool) -> None:
    torch.manual_seed(0)
    layer, found = Linear(16, 24, bias=bias), []
    data, grad = torch.randn(2, 5, 16, dtype=torch.bfloat16), torch.randn(2, 5, 24, dtype=torch.bfloat16)
    for way in (
        layer,
        lambda x: nn.functional.linear(
            x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
        ),
    ):
        x = data.clone().requires_grad_()
        out = way(x)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
