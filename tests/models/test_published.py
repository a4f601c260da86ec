"""The published models of configs/models against their reports and against transformers' own classes."""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from moesys.config.load import load
from moesys.config.schema import ModelConfig
from moesys.kernels import activation
from moesys.models.size import parameters, prediction_parameters

MODELS = {path.stem: path for path in (Path(__file__).parents[2] / "configs" / "models").glob("*.yaml")}


class Published(NamedTuple):
    """Sizes in billions, with the digits that the report gives, and how its active parameters are counted."""

    total: str
    active: str
    embedding: bool
    """Whether active parameters count the input embedding (of which a token uses one row); the head always does."""
    rounding: str = ROUND_HALF_UP
    """How the exact active parameters become the published ones; totals are always rounded to the nearest."""


PUBLISHED = {
    "mixtral-8x7b": Published("46.7", "12.9", embedding=True),
    "mixtral-8x22b": Published("141", "39", embedding=True),
    "olmoe-1b-7b": Published("6.9", "1.3", embedding=True),
    "qwen3-30b-a3b": Published("30.5", "3.3", embedding=True, rounding=ROUND_DOWN),  # 3.353
    "qwen3-235b-a22b": Published("235", "22", embedding=True),
    "deepseek-v2-lite": Published("15.7", "2.4", embedding=False, rounding=ROUND_DOWN),  # 2.451
    "deepseek-v3": Published("671", "37", embedding=False),
    "gpt-oss-120b": Published("116.8", "5.1", embedding=False),
    "gpt-oss-20b": Published("20.9", "3.6", embedding=False),
}

WITHOUT_EMBEDDINGS = {"qwen3-30b-a3b": "29.9", "qwen3-235b-a22b": "234"}
"""All but the embedding and the head, where the model's card tells it, in billions."""

# Each model's published config.json, the keys that differ from the class's defaults.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-8x7b": (
        "Mixtral",
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            rms_norm_eps=1e-5, rope_theta=1e6,
        ),
    ),
    "mixtral-8x22b": (
        "Mixtral",
        dict(
            vocab_size=32000, hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
            num_attention_heads=48, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            rms_norm_eps=1e-5, rope_theta=1e6,
        ),
    ),
    "olmoe-1b-7b": (
        "Olmoe",
        dict(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
            norm_topk_prob=False, rms_norm_eps=1e-5, rope_theta=10000.0,
        ),
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6,
        ),
    ),
    "qwen3-235b-a22b": (
        "Qwen3Moe",
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
            num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6,
        ),
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        dict(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
            n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, norm_topk_prob=False,
            routed_scaling_factor=1.0, rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1,
                "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "deepseek-v3": (
        "DeepseekV3",
        dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
            num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256,
            n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, norm_topk_prob=True,
            routed_scaling_factor=2.5, n_group=8, topk_group=4, rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "gpt-oss-120b": (
        "GptOss",
        dict(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=128,
            num_experts_per_tok=4, attention_bias=True, rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "gpt-oss-20b": (
        "GptOss",
        dict(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
            num_experts_per_tok=4, attention_bias=True, rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
        ),
    ),
}  # fmt: skip


def ours(name: str) -> ModelConfig:
    """The model without multi-token prediction, which reports count apart, and transformers has apart."""
    return load(MODELS[name]).config.model.model_copy(update={"mtp": None})


@cache
def theirs(name: str) -> tuple[Any, dict[str, int]]:
    """transformers' configuration, and the sizes of its model's parameters, which hold no memory."""
    family, keys = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**keys)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return config, {path: p.numel() for path, p in model.named_parameters()}


def as_published(count: int, digits: str, rounding: str = ROUND_HALF_UP) -> str:
    """`count` in billions with as many decimals as `digits` has."""
    return str((Decimal(count) / 10**9).quantize(Decimal(digits), rounding=rounding))


def test_every_model_is_compared():
    assert set(MODELS) == set(PUBLISHED) == set(THEIRS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    published, model = PUBLISHED[name], ours(name)
    total, active = parameters(model, model.vocab_size)
    active -= 0 if published.embedding else model.vocab_size * model.hidden
    assert as_published(total, published.total) == published.total
    assert as_published(active, published.active, published.rounding) == published.active
    if name in WITHOUT_EMBEDDINGS:
        rest = total - 2 * model.vocab_size * model.hidden
        assert as_published(rest, WITHOUT_EMBEDDINGS[name]) == WITHOUT_EMBEDDINGS[name]


def test_multi_token_prediction_of_deepseek_v3_is_as_large_as_its_file_says():
    model = load(MODELS["deepseek-v3"]).config.model
    added = prediction_parameters(model, model.vocab_size)[0]
    assert f"and {as_published(added, '0.1')}B more" in MODELS["deepseek-v3"].read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_comment_at_the_top_tells_the_sizes(name):
    first, published = MODELS[name].read_text().splitlines()[0], PUBLISHED[name]
    assert f"{published.total}B parameters, {published.active}B active" in first


@pytest.mark.parametrize("name", THEIRS)
def test_parameters_are_as_many_as_in_transformers(name):
    config, sizes = theirs(name)
    model = ours(name)
    routed = sum(size for path, size in sizes.items() if ".mlp.experts." in path)
    experts, k = model.moe.experts, config.num_experts_per_tok
    total, active = parameters(model, model.vocab_size)
    assert total == sum(sizes.values())
    assert active == total - routed + routed * k // experts


@pytest.mark.parametrize("name", THEIRS)
def test_what_no_parameter_shows_is_the_same_in_transformers(name):
    config, _ = theirs(name)
    model = ours(name)
    assert model.norm_eps == config.rms_norm_eps
    assert model.rope_theta == config.rope_parameters["rope_theta"]
    scaling = model.rope_scaling
    assert ("default" if scaling is None else scaling.kind) == config.rope_parameters["rope_type"]
    if scaling is not None:
        told = {"original_seq_len": "original_max_position_embeddings"}
        for key in ("factor", "original_seq_len", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            assert getattr(scaling, key) == config.rope_parameters.get(told.get(key, key)), key
        assert scaling.truncate == config.rope_parameters.get("truncate", True)
    windows = [model.mixer(layer)[0].window if model.attention.kind == "gqa" else None for layer in range(model.depth)]
    sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [""] * model.depth]
    assert windows == [config.sliding_window if each else None for each in sliding]
    assert model.tie_embeddings == config.tie_word_embeddings
    assert model.attention.heads == config.num_attention_heads
    assert model.moe.top_k == config.num_experts_per_tok
    # Mixtral and GPT-OSS have no key for it and always normalise; only DeepSeek scales.
    assert model.moe.normalize == getattr(config, "norm_topk_prob", True)
    assert model.moe.scale == getattr(config, "routed_scaling_factor", 1.0)


def test_the_gate_of_deepseek_v3_is_that_of_transformers():
    # That the gate of these keys computes what transformers' does is tested in test_transformers.
    config, _ = theirs("deepseek-v3")
    gate = ours("deepseek-v3").moe.gate
    assert (gate.groups, gate.groups_kept) == (config.n_group, config.topk_group)
    assert (gate.score, gate.group_score) == ("sigmoid", "top2")


@pytest.mark.parametrize("name", ["gpt-oss-120b", "gpt-oss-20b"])
def test_the_experts_of_gpt_oss_are_those_of_transformers(name):
    config, _ = theirs(name)
    assert ours(name).moe.activation == "clipped_swiglu"
    assert (config.swiglu_alpha, config.swiglu_limit) == (activation.ALPHA, activation.LIMIT)
