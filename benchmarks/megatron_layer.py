"""Megatron-Core's own MoE layer, for comparisons on CPU with gloo and on GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moesys.megatron.cpu import cpu_substitutes
from moesys.moe import MoELayer
from moesys.moe.experts import Experts


class OwnLayer(nn.Module):
    """`megatron.core`'s MoELayer with the weights of `layer`, whose experts are this rank's: [1, T, H] → same.

    Build and run it inside `layers`.

    Args:
        layer: softmax top-k gate, dropless, SwiGLU experts without biases.
        dispatcher: "alltoall" or "allgather".
    """

    def __init__(self, layer: MoELayer, experts: int, top_k: int, dispatcher: str):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
            from megatron.core.transformer.moe.moe_layer import MoELayer as Theirs
            from megatron.core.transformer.transformer_config import TransformerConfig

            experts_module = layer.experts
            assert isinstance(experts_module, Experts)
            local, hidden, _, inner = experts_module.fc1.shape
            config = TransformerConfig(
                num_layers=1, hidden_size=hidden, num_attention_heads=1, ffn_hidden_size=inner,
                moe_ffn_hidden_size=inner, num_moe_experts=experts, moe_router_topk=top_k,
                moe_token_dispatcher_type=dispatcher,
                moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, add_bias_linear=False,
                gated_linear_unit=True, activation_func=nn.functional.silu, use_cpu_initialization=True,
                expert_model_parallel_size=experts // local, params_dtype=experts_module.fc1.dtype,
                moe_router_dtype="fp32",
            )  # fmt: skip
            spec = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
            self.layer = Theirs(config, spec.submodules, layer_number=1)
        with torch.no_grad():
            self.layer.router.weight.copy_(layer.gate.get_parameter("projection.weight"))
            for number, expert in enumerate(self.layer.experts.local_experts):
                expert.linear_fc1.weight.copy_(experts_module.fc1[number].flatten(1).t())
                expert.linear_fc2.weight.copy_(experts_module.fc2[number].t())

    def forward(self, x: Tensor) -> Tensor:
        """The output [1, T, H] of x [1, T, H]."""
        return self.layer(x.transpose(0, 1).contiguous())[0].transpose(0, 1)


@contextmanager
def layers(layer: MoELayer, experts: int, top_k: int, ranks: int) -> Iterator[dict[str, nn.Module]]:
    """Megatron's layer with each of its dispatchers, experts over `ranks`; empty if Megatron is not installed.

    Collective over the world. The layers work only inside this context.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state
    except ModuleNotFoundError:
        yield {}
        return
    with cpu_substitutes():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
        try:
            yield {f"megatron {name}": OwnLayer(layer, experts, top_k, name) for name in ("alltoall", "allgather")}
        finally:
            parallel_state.destroy_model_parallel()
