"""Tiny random models of every family, as transformers builds and saves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesys.config.schema import ModelConfig
from moesys.hub.family import Family, families
from moesys.hub.fit import Fit
from moesys.hub.mapping import whole
from moesys.hub.weights import ReleasedWeights
from moesys.models.decoder import Decoder

VOCAB, TOKENS = 96, 21
SHARD = "12KB"


@dataclass(frozen=True)
class Case:
    """A configuration of one family. `config`: beside `COMMON`."""

    family: str
    config: dict[str, Any]
    name: str = ""

    @property
    def id(self) -> str:
        """Name of the test."""
        return f"{self.family}-{self.name}" if self.name else self.family


COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = {"head_dim": 12}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
DEEPSEEK = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LOCAL = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 16, "beta_slow": 1}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 1.5, 4.0, 8.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}

CASES = [
    Case("llama", {**HEAD, "intermediate_size": 40, "attention_bias": True, "rope_parameters": LLAMA3}),
    Case("mistral", {**HEAD, "intermediate_size": 40, "sliding_window": 8, "rope_parameters": LINEAR}),
    Case("qwen3", {**HEAD, "intermediate_size": 40, "tie_word_embeddings": True}),
    Case(
        "qwen3",
        {**HEAD, "intermediate_size": 40, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "window",
    ),
    Case("mixtral", {**HEAD, **LOCAL, "sliding_window": 8}),
    Case(
        "olmoe",
        {
            "intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.9,
            "num_key_value_heads": 2,
        },
    ),
    Case(
        "qwen2_moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    Case(
        "qwen3_moe",
        {
            **HEAD,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    Case(
        "deepseek_v2",
        {
            **LATENT,
            **DEEPSEEK,
            "q_lora_rank": 16,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": DEEPSEEK_YARN,
            "rms_norm_eps": 1e-3,
        },
    ),
    Case("deepseek_v2", {**LATENT, **DEEPSEEK, "q_lora_rank": None}, "lite"),
    Case(
        "deepseek_v3",
        {**LATENT, **DEEPSEEK, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN},
    ),
    Case(
        "deepseek_v3",
        {**LATENT, **DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-3},
        "moonlight",
    ),
    Case("glm4_moe", {**HEAD, **DEEPSEEK, "attention_bias": True, "use_qk_norm": True}),
    Case("dots1", {**HEAD, **DEEPSEEK, "sliding_window": 8, "max_window_layers": 1, "norm_topk_prob": True}),
    Case("gpt_oss", {**HEAD, **LOCAL, "sliding_window": 8}),
    Case(
        "ernie4_5_moe",
        {
            **HEAD,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_norm_min": 0.6,
        },
    ),
    Case("minimax_m2", {**HEAD, **LOCAL, "rotary_dim": 6}),
    Case(
        "granitemoe",
        {
            **LOCAL,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "granitemoeshared",
        {**LOCAL, "shared_intermediate_size": 28, "attention_bias": True, "attention_multiplier": 0.3},
    ),
    Case(
        "phimoe",
        {
            **LOCAL,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 256,
        },
    ),
    Case(
        "hunyuan_v1_moe",
        {**HEAD, "intermediate_size": 24, "num_experts": 4, "moe_topk": 2, "attention_bias": True},
    ),
]


def config(case: Case) -> Any:
    """The configuration by transformers' class."""
    return CONFIG_MAPPING[case.family](**{**COMMON, **case.config})


def build(case: Case) -> nn.Module:
    """A float32 model in evaluation whose weights, biases, norms, sinks and selection biases are all random."""
    torch.manual_seed(0)
    made = config(case)
    made._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(made).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            is_norm = "norm" in name and name.endswith("weight")
            # Larger matrices give gradients that rounding alone changes by more than the tests allow.
            tensor.normal_(1.0 if is_norm else 0.0, 0.15 if tensor.ndim > 1 else 0.3 if is_norm else 0.5)
    return model


def save(model: Any, folder: Path) -> None:
    """Write the model as transformers does, in several shards."""
    model.save_pretrained(folder, max_shard_size=SHARD)


def tokens() -> Tensor:
    """A batch of two sequences."""
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def filled(fitting: Fit, model: ModelConfig) -> Decoder:
    """The native model with the weights of a folder, in evaluation."""
    source, decoder = ReleasedWeights(fitting), Decoder(model, VOCAB).eval()
    state = decoder.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in fitting.stored:
            source.read_into(state[name].data, name, whole(state[name].shape))
    return decoder


def family(kind: str) -> Family:
    """A family by its `model_type`."""
    return families()[kind]


@dataclass
class InMemory:
    """Parts of a model's weights."""

    state: dict[str, Tensor]

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return self.state[name][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].clone()
