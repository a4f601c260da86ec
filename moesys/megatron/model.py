"""Megatron-Core's `GPTModel` of a run's configuration, on this rank."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moesys.config.schema import Config
from moesys.megatron.mesh import MegatronRanks
from moesys.megatron.native_layer import NativeLayer, PackedTokens
from moesys.models.parts.model import mixers
from moesys.parallel import pipeline
from moesys.parallel.cost import Stage


def transformer_config(run: Config, ranks: MegatronRanks, stages: list[Stage], **more: Any) -> Any:
    """The `TransformerConfig` of a run; `more` are further fields of it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, p, t, a = run.model, run.parallel, run.train, run.model.attention
    heads, kv_heads, head_dim, _ = mixers(m)[0].head_sizes()
    on_cpu = ranks.device.type == "cpu"
    dtype = getattr(torch, t.dtype)
    given: dict[str, Any] = {
        "num_layers": m.depth, "hidden_size": m.hidden, "ffn_hidden_size": m.ffn_hidden or m.hidden,
        "num_attention_heads": heads, "num_query_groups": kv_heads, "kv_channels": head_dim,
        "qk_layernorm": a.qk_norm == "head", "add_qkv_bias": a.bias == "qkv",
        "normalization": "RMSNorm", "layernorm_epsilon": m.norm_eps,
        "gated_linear_unit": True, "activation_func": nn.functional.silu, "add_bias_linear": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "params_dtype": dtype, "pipeline_dtype": dtype, "bf16": t.dtype == "bfloat16",
        "use_cpu_initialization": on_cpu,
        "tensor_model_parallel_size": p.tp, "sequence_parallel": p.sp and p.tp > 1,
        "expert_model_parallel_size": p.ep, "expert_tensor_parallel_size": p.etp,
        "pipeline_model_parallel_size": p.pp,
        "virtual_pipeline_model_parallel_size": p.pp_virtual if p.pp_virtual > 1 else None,
        "deterministic_mode": t.deterministic and not on_cpu,
    }  # fmt: skip
    if not on_cpu:
        given |= {"bias_activation_fusion": True, "bias_dropout_fusion": True}
    if p.pp > 1:
        given["pipeline_model_parallel_layout"] = [
            ["embedding"] * s.first + ["decoder"] * len(s.layers) + ["loss"] * s.last for s in stages
        ]
    if p.pp_virtual > 1:
        # In one batch, Megatron would confuse the messages of both directions between two ranks.
        given |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if t.recompute == "full":
        given |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif t.recompute == "selective":
        given |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if m.moe is not None:
        given |= {
            "num_moe_experts": m.moe.experts, "moe_router_topk": m.moe.top_k, "moe_ffn_hidden_size": m.moe.ffn_hidden,
            "moe_layer_freq": [int(m.is_moe(i)) for i in range(m.depth)], "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(**(given | more))


def chunks(run: Config, ranks: MegatronRanks, vocab_size: int, config: Any, plug_in: bool = True) -> list[nn.Module]:
    """The stages of this rank, in order, not initialised. `plug_in`: use this project's MoE layer, else Megatron's.

    Collective over the world.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    stages = pipeline.stages(run, vocab_size)
    found = []
    for number, stage in enumerate(stages[ranks.place["pp"] :: run.parallel.pp]):
        vp_stage = number if run.parallel.pp_virtual > 1 else None
        chunk: nn.Module = GPTModel(
            config,
            _spec(run, ranks, vocab_size, config, stage, vp_stage, plug_in),
            vocab_size,
            run.train.seq_len,
            pre_process=stage.first,
            post_process=stage.last,
            share_embeddings_and_output_weights=run.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=run.model.rope_theta,
            vp_stage=vp_stage,
        )
        chunk.to(ranks.device)
        found.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return found


class Norm(nn.RMSNorm):
    """torch's norm, for runs without Transformer Engine and apex; it supports sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _spec(
    run: Config, ranks: MegatronRanks, vocab_size: int, config: Any, stage: Stage, vp_stage: int | None, plug_in: bool
) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as theirs
    from megatron.core.transformer.spec_utils import ModuleSpec

    engine = theirs.HAVE_TE and ranks.device.type == "cuda"
    block = theirs.get_gpt_decoder_block_spec(config, engine, normalization="RMSNorm", vp_stage=vp_stage)
    norms = {} if engine or theirs.HAVE_APEX else {"input_layernorm": Norm, "pre_mlp_layernorm": Norm}
    layers = []
    for number, layer in zip(stage.layers, block.layer_specs, strict=True):
        parts = replace(layer.submodules, **norms)
        if norms and run.model.attention.qk_norm == "head":
            attention = parts.self_attention
            own = replace(attention.submodules, q_layernorm=Norm, k_layernorm=Norm)
            parts = replace(parts, self_attention=replace(attention, submodules=own))
        if plug_in and run.model.is_moe(number):
            given = {"run": run, "ranks": ranks, "marks": PackedTokens(vocab_size), "layer": number}
            parts = replace(parts, mlp=ModuleSpec(module=NativeLayer, params=given))
        layers.append(replace(layer, submodules=parts))
    return replace(block, layer_specs=layers, **({"layer_norm": Norm} if norms else {}))
