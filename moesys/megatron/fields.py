"""Every field of Megatron-Core's `TransformerConfig`, and its treatment by the plug-in: none is ignored in silence.

The tables cover the releases 0.16.1, 0.17.1, 0.18.2 and 0.19.2, `MLATransformerConfig` included; `unknown` finds
what a later release adds to the MoE layer. `moesys.megatron.unsupported` has the fields that the plug-in refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from moesys.megatron.unsupported import UNSUPPORTED

_READ = """
    hidden_size num_layers mtp_num_layers mtp_use_repeated_layer num_moe_experts moe_ffn_hidden_size
    activation_func gated_linear_unit glu_linear_offset activation_func_clamp_value add_bias_linear
    moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_num_groups moe_router_group_topk moe_router_dtype moe_router_enable_expert_bias
    moe_expert_capacity_factor moe_token_drop_policy moe_pad_expert_input_to_capacity
    moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps
    calculate_per_token_loss moe_token_dispatcher_type
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap
    recompute_granularity recompute_modules
    params_dtype use_cpu_initialization perform_initialization init_method output_layer_init_method sequence_parallel
"""
READ = frozenset(_READ.split())
"""Fields that the layer reads. It follows them, or refuses some of their values."""

_EFFECTIVE = {
    "the process groups say it": """
        tensor_model_parallel_size expert_model_parallel_size expert_tensor_parallel_size context_parallel_size""",
    "Megatron's specs put the layer where it says": "moe_layer_freq ffn_hidden_size",
    "Megatron derives from it a field that the layer follows": """
        moe_layer_recompute init_method_std fp16 bf16 mup_base_hidden_size mup_width_mult""",
    "finalize_model_grads reads it, and moves the layer's selection bias": "moe_router_bias_update_rate",
    "Megatron's schedules set the scale of the losses, which the layer's have": "grad_scale_func moe_grad_scale_func",
    "Megatron's logger reads it, and finds the layer's metrics by block": "moe_per_layer_logging",
    "Megatron's block does it around any feed-forward, this one too": """
        recompute_method recompute_num_layers distribute_saved_activations hidden_dropout bias_dropout_fusion
        mlp_chunks_for_prefill mlp_chunks_for_training fp32_residual_connection fused_residual_rmsnorm""",
    "torch's own switch, which Megatron sets, and which holds for every operation": """
        deterministic_mode disable_bf16_reduced_precision_matmul""",
    "the layer always multiplies the experts in groups, each weight of them in one tensor": """
        moe_grouped_gemm moe_use_legacy_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias""",
    "it chooses a kernel with the same result; the layer has its own": """
        moe_permute_fusion moe_router_fusion bias_activation_fusion use_fused_weighted_squared_relu
        use_te_activation_func use_transformer_engine_op_fuser gradient_accumulation_fusion
        use_grouped_gemm_for_shared_expert async_tensor_model_parallel_allreduce
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
        tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend symmetric_ar_type""",
    "it tunes the libraries of Megatron's flex dispatcher, in whose place the layer has its own dispatchers": """
        moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_deepep_num_sms
        moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_permute_fusion_into_hybridep
        moe_ncclep_static_shape moe_ncclep_zero_copy""",
    "it is a part of a feature that is refused": """
        moe_router_quantile_balancing_ema moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu cpu_offloading_num_layers _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        cpu_offloading_retain_pinned_cpu_buffers fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval
        fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention
        fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16 disable_parameter_transpose_cache fp4_recipe fp4_param fp4_quantizer_factory
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps cuda_graph_scope
        cuda_graph_modules ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
        inference_cuda_graph_scope inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type inference_disable_triton_nvls_kernels inference_fuse_tp_communication
        nccl_all_reduce_for_prefill delay_offload_until_cuda_graph""",
    "it says how the activations of the modules in offload_modules travel": """
        fine_grained_activation_offloading min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads""",
}

_UNRELATED = {
    "of attention": """
        num_attention_heads attention_backend flash_attention_version softmax_scale softmax_type num_query_groups
        kv_channels attention_dropout add_qkv_bias rotary_interleaved window_size window_attn_skip_freq qk_layernorm
        qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit attention_output_gate
        multi_latent_attention no_rope_freq experimental_attention_variant
        experimental_attention_variant_loss_scale_func dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
        dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
        dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        apply_query_key_layer_scaling attention_softmax_in_fp32 masked_softmax_fusion apply_rope_fusion
        fused_single_qkv_rope use_kitchen_attention kitchen_attention_backend tp_comm_overlap_disable_qkv cp_comm_type
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel flash_decode
        mrope_section mup_base_head_dim mup_attn_scale_power q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim
        v_head_dim rope_type rotary_base rotary_percent rotary_scaling_factor original_max_position_embeddings
        beta_fast beta_slow mscale mscale_all_dim cache_mla_latents mla_down_proj_fusion""",
    "of norms": """
        normalization layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
        persist_layer_norm memory_efficient_layer_norm""",
    "of embeddings and the head": """
        embedding_init_method embedding_init_method_std clone_scatter_output_in_embedding
        cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit
        mup_embedding_mult mup_output_mult""",
    "of dense feed-forwards": "use_grouped_gemm_for_dense_mlp",
    "of state space layers": """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_training_ssm_states_dtype
        use_mamba_mem_eff_path""",
    "of multi-token prediction around the layer": """
        mtp_standalone mtp_loss_scaling_factor mtp_detach_heads mtp_hybrid_override_pattern mtp_grad_scale_func""",
    "of pipelining and its schedules": """
        pipeline_model_parallel_comm_backend pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        pipeline_dtype variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p
        deallocate_pipeline_outputs overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage
        num_microbatches_with_partial_activation_checkpoints num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split enable_autocast autocast_dtype""",
    "of the training loop": """
        timers finalize_model_grads_func no_sync_func grad_sync_func param_sync_func barrier_with_L1_time
        use_te_rng_tracker inference_rng_tracker inference_sampling_seed config_logger_dir test_mode""",
    "of models whose blocks differ in kind, which have no MoE layers": """
        heterogeneous_block_specs hetereogenous_dist_checkpoint""",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: why for why, names in table.items() for name in names.split()}


EFFECTIVE = _by_name(_EFFECTIVE)
"""Fields that take effect although the layer does not read them, with the reason."""

UNRELATED = _by_name(_UNRELATED)
"""Fields that do not concern the layer, with the part that they concern."""


def undecided(config: Any) -> Iterator[str]:
    """Names of fields of `config`, a dataclass or its instance, that are in no table."""
    decided = (READ, UNSUPPORTED, EFFECTIVE, UNRELATED)
    return (f.name for f in fields(config) if not any(f.name in table for table in decided))


MOE_NAMES = ("moe", "expert", "router", "glu")
"""Parts of the names of the MoE layer's fields."""


def unknown(config: Any) -> Iterator[str]:
    """Names of fields of the MoE layer that are in no table and differ from their default."""
    new = set(undecided(config))
    for f in fields(config):
        if f.name in new and any(part in f.name for part in MOE_NAMES):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if getattr(config, f.name) != default:
                yield f.name
