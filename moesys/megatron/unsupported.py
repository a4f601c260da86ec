"""Fields of Megatron-Core's `TransformerConfig` that the plug-in refuses, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moesys.errors import Problem


def _is_set(config: Any, value: Any) -> bool:
    return bool(value)


@dataclass(frozen=True)
class Unsupported:
    """A field that may ask for a feature that the plug-in lacks.

    Attributes:
        why: the reason.
        remedy: what to do.
        asks: returns True if `value`, the field's in `config`, asks for it.
    """

    why: str
    remedy: str = "leave it unset, or use Megatron's own layer"
    asks: Callable[[Any, Any], bool] = _is_set


def _is_given(config: Any, value: Any) -> bool:
    return value is not None


def _more_than_one(config: Any, value: Any) -> bool:
    return value is not None and value > 1


def _more_shards_than(size: str) -> Callable[[Any, Any], bool]:
    return lambda config, value: value is not None and value != (getattr(config, size) or 1)


def _other_than(*plain: Any) -> Callable[[Any, Any], bool]:
    return lambda config, value: value not in plain


def _inside_the_layer(config: Any, value: Any) -> bool:
    inside = {"expert_fc1", "moe_act", "fused_group_mlp"}
    return bool(getattr(config, "fine_grained_activation_offloading", False)) and bool(inside & set(value or ()))


BITS = "experts do not compute in eight bits"
GRAPHS = "split sizes of dispatch are not known when a graph is captured"
SHARDS = "weights are split over tensor and expert ranks alone"
BLOCKS = "the gate and the linear part of an activation lie one after the other, not in blocks in turn"
WGRAD = "gradients of weights are computed with those of inputs"
INFERENCE = "the layer has no separate path for inference"

UNSUPPORTED = {
    "moe_latent_size": Unsupported("experts work on the whole hidden size"),
    "moe_apply_probs_on_input": Unsupported("weights multiply the experts' outputs"),
    "moe_enable_routing_replay": Unsupported("routing is not replayed"),
    "moe_router_force_load_balancing": Unsupported("logits are not random"),
    "moe_router_force_biased": Unsupported("logits are not random", asks=_is_given),
    "moe_router_padding_for_quantization": Unsupported(BITS),
    "moe_router_padding_for_fp8": Unsupported(BITS),
    "moe_router_topk_limited_devices": Unsupported(
        "Megatron replaced it by moe_router_num_groups and moe_router_group_topk"
    ),
    "moe_token_dropping": Unsupported("Megatron does not support it", "moe_expert_capacity_factor drops tokens"),
    "moe_extended_tp": Unsupported("Megatron replaced it by expert_tensor_parallel_size"),
    "moe_expert_rank_capacity_factor": Unsupported(
        "capacity is of experts, not of ranks", "moe_expert_capacity_factor", _is_given
    ),
    "moe_mlp_glu_interleave_size": Unsupported(BLOCKS, asks=_is_given),
    "moe_shared_expert_glu_interleave_size": Unsupported(BLOCKS, asks=_is_given),
    "moe_paged_stash": Unsupported("activations of experts stay where they are"),
    "moe_pad_experts_for_cuda_graph_inference": Unsupported(INFERENCE),
    "use_inference_optimized_layers": Unsupported(INFERENCE),
    "transformer_impl": Unsupported(
        INFERENCE, "transformer_engine or local", lambda config, value: value == "inference_optimized"
    ),
    "fp8": Unsupported(BITS),
    "fp4": Unsupported("experts do not compute in four bits"),
    "quant_recipe": Unsupported(BITS, asks=_is_given),
    "use_kitchen": Unsupported(BITS),
    "activation_func_fp8_input_store": Unsupported("what backward needs of activations is kept in the model's type"),
    "batch_invariant_mode": Unsupported("its kernels may depend on how many tokens there are"),
    "overlap_moe_expert_parallel_comm": Unsupported("dispatch overlaps the shared experts and other chunks alone"),
    "overlap_dispatch_backward_with_experts_wgrad": Unsupported(
        "gradients of weights are computed with those of inputs"
    ),
    "delay_wgrad_compute": Unsupported(WGRAD),
    "cuda_graph_impl": Unsupported(GRAPHS, "set it to none", _other_than(None, "none")),
    "enable_cuda_graph": Unsupported(GRAPHS),
    "external_cuda_graph": Unsupported(GRAPHS),
    "cpu_offloading": Unsupported("its activations stay on the GPU"),
    "offload_modules": Unsupported(
        "inside of the layer activations stay on the GPU",
        "leave out expert_fc1, moe_act and fused_group_mlp",
        _inside_the_layer,
    ),
    "init_model_with_meta_device": Unsupported(
        "its weights get their values when it is built", "--no-init-model-with-meta-device"
    ),
    "use_mup": Unsupported(
        "the optimizer would scale the experts' stacked biases as matrices",
        "--disable-bias-linear",
        lambda config, value: bool(value and config.add_bias_linear),
    ),
    "gtp_weight_remat_size": Unsupported(SHARDS, "leave it 1", _more_than_one),
    "expert_gtp_weight_remat_size": Unsupported(SHARDS, "leave it 1", _more_than_one),
    "tensor_parallel_num_weight_shards": Unsupported(
        SHARDS, "as many as tensor_model_parallel_size", _more_shards_than("tensor_model_parallel_size")
    ),
    "expert_tensor_parallel_num_weight_shards": Unsupported(
        SHARDS, "as many as expert_tensor_parallel_size", _more_shards_than("expert_tensor_parallel_size")
    ),
}
"""Unsupported features by field. A field that a release of Megatron-Core lacks asks for nothing."""


def unsupported(config: Any) -> list[Problem]:
    """Problems of features that `config` asks for and the plug-in lacks."""
    found = []
    for name, rule in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if hasattr(config, name) and rule.asks(config, value):
            found.append(Problem(name, f"not in the plug-in: {rule.why}", rule.remedy, repr(value)))
    return found
