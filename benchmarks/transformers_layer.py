"""transformers' Mixtral block with the weights of our layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesys.measure import checkout
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.moe import MoELayer


def blocks(layer: MoELayer, shape: LayerShape) -> dict[str, nn.Module]:
    """transformers' Mixtral block with the layer's weights, by each of its implementations; empty without it.

    They share the one block, whose experts' weights are copies in its own layout, or views of the layer's
    where memory is scarce: on a GPU of which these are more than a sixth, as their gradients are again.
    """
    try:
        with checkout.hidden():
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    options: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn_hidden,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
    }
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(MixtralConfig(**options))
    fc1, fc2 = layer.experts.get_parameter("fc1").detach(), layer.experts.get_parameter("fc2").detach()
    theirs = fc1.flatten(2).mT, fc2.mT
    if not scarce(fc1.nbytes + fc2.nbytes, fc1.device):
        theirs = theirs[0].contiguous(), theirs[1].contiguous()
    block.experts.gate_up_proj, block.experts.down_proj = map(nn.Parameter, theirs)
    block.gate.weight = nn.Parameter(layer.gate.get_parameter("projection.weight").detach())
    return {implementation: _By(implementation, block) for implementation in ("eager", "grouped_mm")}


def scarce(weights: int, device: torch.device) -> bool:
    """True if the machine cannot hold so many bytes of weights twice."""
    return device.type == "cuda" and 6 * weights > torch.cuda.mem_get_info(device)[1]


class _By(nn.Module):
    """A block of transformers whose experts run by one of its implementations."""

    def __init__(self, implementation: str, block: Any):
        super().__init__()
        self.implementation, self.block = implementation, block

    def forward(self, x: Tensor) -> Tensor:
        self.block.experts.config._experts_implementation = self.implementation
        return self.block(x)
