"""The native model against transformers' models of the same weights: logits and every gradient."""

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor

from moesys.config import Config
from moesys.models.decoder import Decoder

V, S = 64, 12
COMMON = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=V, max_position_embeddings=64,
    num_experts_per_tok=2, pad_token_id=None, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-6,
)  # fmt: skip
MOE = {"experts": 4, "top_k": 2, "balance_loss": 0.0}


def mixtral():
    theirs = transformers.MixtralConfig(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    ours = {"attention": {"heads": 4, "kv_heads": 2}, "rope_theta": 1e6, "moe": {**MOE, "ffn_hidden": 48}}
    return transformers.MixtralForCausalLM(theirs), ours


def mixtral_windows():
    theirs = transformers.MixtralConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    ours = {"attention": {"heads": 4, "kv_heads": 2, "window": 5}, "moe": {**MOE, "ffn_hidden": 48}}
    return transformers.MixtralForCausalLM(theirs), ours


def qwen3_moe():
    theirs = transformers.Qwen3MoeConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, num_experts=4, moe_intermediate_size=16, head_dim=16,
        norm_topk_prob=True, decoder_sparse_step=2, tie_word_embeddings=True,
    )  # fmt: skip
    ours = {
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16, "qk_norm": "head"},
        "ffn_hidden": 48,
        "tie_embeddings": True,
        "moe": {**MOE, "ffn_hidden": 16, "every": 2},
    }
    return transformers.Qwen3MoeForCausalLM(theirs), ours


def olmoe():
    theirs = transformers.OlmoeConfig(**COMMON, num_key_value_heads=4, intermediate_size=48, num_experts=4)
    ours = {"attention": {"heads": 4, "qk_norm": "full"}, "moe": {**MOE, "ffn_hidden": 48, "normalize": False}}
    return transformers.OlmoeForCausalLM(theirs), ours


def deepseek_v2():
    theirs = transformers.DeepseekV2Config(
        **COMMON, num_key_value_heads=4, intermediate_size=48, n_routed_experts=4, moe_intermediate_size=16,
        first_k_dense_replace=1, n_shared_experts=2, q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12, topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
        head_dim=8,
    )  # fmt: skip
    attention = {
        "kind": "mla", "heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12,
    }  # fmt: skip
    ours = {
        "attention": attention,
        "ffn_hidden": 48,
        "moe": {**MOE, "ffn_hidden": 16, "first_dense": 1, "shared_experts": 2, "normalize": False},
    }
    return transformers.DeepseekV2ForCausalLM(theirs), ours


YARN = {"factor": 40.0, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
"""DeepSeek's, with a ramp inside of the few pairs."""


def deepseek_v3():
    stretched = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32, **YARN}
    theirs = transformers.DeepseekV3Config(
        **COMMON, rope_parameters=stretched, num_key_value_heads=4, intermediate_size=48, n_routed_experts=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=12, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    gate = {"score": "sigmoid", "groups": 4, "groups_kept": 2, "group_score": "top2"}
    moe = {"experts": 8, "ffn_hidden": 16, "first_dense": 1, "shared_experts": 1, "gate": gate, "scale": 2.5}
    scaling = {"kind": "yarn", "original_seq_len": 32, **YARN}
    ours = {**deepseek_v2()[1], "rope_scaling": scaling, "moe": {**MOE, **moe}}
    return transformers.DeepseekV3ForCausalLM(theirs), ours


def glm4_moe():
    theirs = transformers.Glm4MoeConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, n_routed_experts=4, moe_intermediate_size=16,
        head_dim=16, attention_bias=True, use_qk_norm=True, first_k_dense_replace=1, n_shared_experts=1,
        routed_scaling_factor=1.5, rope_parameters={"rope_theta": 1e4, "rope_type": "default",
        "partial_rotary_factor": 0.5},
    )  # fmt: skip
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 16, "bias": "qkv", "qk_norm": "head", "rotary_fraction": 0.5}
    gate = {"score": "sigmoid"}
    moe = {**MOE, "ffn_hidden": 16, "first_dense": 1, "shared_experts": 1, "gate": gate, "scale": 1.5}
    return transformers.Glm4MoeForCausalLM(theirs), {"attention": attention, "ffn_hidden": 48, "moe": moe}


def gpt_oss():
    stretched = {"factor": 32.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
    theirs = transformers.GptOssConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=24, num_local_experts=4, head_dim=16, sliding_window=5,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1.5e5, "original_max_position_embeddings": 32, **stretched,
        },
    )  # fmt: skip
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 16, "bias": True, "sinks": True}
    ours = {
        "layers": {"count": 2, "repeat": ["local moe", "attention moe"]},
        "attention": attention,
        "mixers": {"local": {**attention, "window": 5}},
        "rope_theta": 1.5e5,
        "rope_scaling": {"kind": "yarn", "original_seq_len": 32, **stretched},
        "moe": {**MOE, "ffn_hidden": 24, "activation": "clipped_swiglu", "bias": True, "gate": {"bias": True}},
    }
    return transformers.GptOssForCausalLM(theirs), ours


def llama():
    stretched = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 32, **stretched,
        },
    )  # fmt: skip
    scaling = {"kind": "llama3", "original_seq_len": 32, **stretched}
    ours = {"attention": {"heads": 4, "kv_heads": 2}, "ffn_hidden": 48, "rope_theta": 5e5, "rope_scaling": scaling}
    return transformers.LlamaForCausalLM(theirs), ours


def qwen2_moe():
    theirs = transformers.Qwen2MoeConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=40, norm_topk_prob=False,
    )  # fmt: skip
    shared = {"shared_experts": 1, "shared_ffn_hidden": 40, "shared_mix": "gate"}
    ours = {
        "attention": {"heads": 4, "kv_heads": 2, "bias": "qkv"},
        "moe": {**MOE, "ffn_hidden": 16, "normalize": False, **shared},
    }
    return transformers.Qwen2MoeForCausalLM(theirs), ours


RENAMED = {
    "embed.": "model.embed_tokens.", "head.": "lm_head.", "norm.weight": "model.norm.weight",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attention.": "self_attn.",
    "ffn.gate.projection": "mlp.gate", "ffn.shared": "mlp.shared_experts",
    "ffn.mix.projection": "mlp.shared_expert_gate", "ffn.": "mlp.",
}  # fmt: skip


def theirs_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor of transformers' model (or its gradient) that corresponds to our parameter `name`."""
    path = f"model.{name}" if name.startswith("layers") else name
    for ours, renamed in RENAMED.items():
        path = renamed + path[len(ours) :] if path.startswith(ours) else path.replace(f".{ours}", f".{renamed}")
    path = path.replace("_a_norm", "_a_layernorm")
    if path not in tensors:
        path = path.replace("shared_experts.", "shared_expert.")  # Qwen2-MoE has one
    if "model.layers.0.mlp.router.bias" in tensors:
        return of_gpt_oss(path, tensors)
    if path.endswith("experts.fc1"):
        return tensors[path[: -len("fc1")] + "gate_up_proj"].transpose(1, 2).unflatten(2, (2, -1))
    if path.endswith("experts.fc2"):
        return tensors[path[: -len("fc2")] + "down_proj"].transpose(1, 2)
    return rotary_halves(tensors[path], path)


def of_gpt_oss(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Its experts lie as ours, with gates and linear parts in turns."""
    for ours, renamed in {"mlp.gate.": "mlp.router.", "sinks.weight": "sinks", "fc2": "down_proj"}.items():
        path = path.replace(ours, renamed)
    if "experts.fc1" in path:
        return tensors[path.replace("fc1", "gate_up_proj")].unflatten(-1, (-1, 2)).transpose(-1, -2)
    return tensors[path]


def rotary_halves(weight: Tensor, path: str) -> Tensor:
    """DeepSeek rotates neighbouring elements, we rotate halves: reorder the rows of rotary parts."""
    if path.endswith("q_b_proj.weight"):
        heads = weight.unflatten(0, (4, 16))
        return torch.cat([heads[:, :8], heads[:, 8::2], heads[:, 9::2]], 1).flatten(0, 1)
    if path.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat([weight[:24], weight[24::2], weight[25::2]])
    return weight


def randomise(model: torch.nn.Module) -> None:
    """Give what starts as zeros other values: biases."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(
    "make",
    [mixtral, mixtral_windows, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, llama],
    ids=lambda f: f.__name__,
)
def test_logits_and_gradients_equal_transformers(make):
    torch.manual_seed(0)
    theirs, ours = make()
    config = Config.model_validate({"model": {"hidden": 32, "layers": 2, "norm_eps": 1e-6, **ours}})
    model = Decoder(config.model, V)
    randomise(theirs)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs_of(name, state))
    tokens = torch.randint(0, V, (2, S))
    labels = torch.randint(0, V, (2 * S,))
    logits, expected = model(tokens), theirs(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output.flatten(0, 1), labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        other = theirs_of(name, gradients)
        relative = (parameter.grad - other).norm() / other.norm()
        assert relative < 2e-5, name
