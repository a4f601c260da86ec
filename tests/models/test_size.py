"""Sizes told without building, against the built model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesys.config import Config
from moesys.models.attention import Sinks
from moesys.models.decoder import Decoder
from moesys.models.layers import LayerNorm, RMSNorm
from moesys.models.size import flops_per_token, parameters, prediction_parameters, weights
from moesys.moe.gates.cosine import CosineProjection

MODELS = {
    "dense": {"ffn_hidden": 96},
    "tied": {"ffn_hidden": 96, "tie_embeddings": True, "attention": {"heads": 4, "bias": True, "qk_norm": "full"}},
    "moe": {
        "moe": {"experts": 8, "top_k": 2, "ffn_hidden": 32},
        "attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head"},
    },
    "mixed": {
        "ffn_hidden": 96,
        "moe": {"experts": 8, "ffn_hidden": 32, "every": 2, "first_dense": 1, "shared_experts": 2},
    },
    "gated": {
        "moe": {"experts": 4, "ffn_hidden": 32, "shared_experts": 1, "shared_ffn_hidden": 48, "shared_mix": "gate"}
    },
    "lora": {"moe": {"experts": 4, "ffn_hidden": 32, "lora_rank": 4}},
    "lora-gelu": {"moe": {"experts": 4, "ffn_hidden": 32, "lora_rank": 4, "activation": "gelu"}},
    "residual": {"moe": {"experts": 4, "ffn_hidden": 32, "shared_experts": 1, "shared_mix": "residual"}},
    "cmr": {
        "moe": {"experts": 4, "ffn_hidden": 32, "shared_experts": 1, "shared_mix": "cmr", "activation": "relu2"},
    },
    "ahead": {"mtp": {"depth": 2}, "ffn_hidden": 96, "moe": {"experts": 4, "ffn_hidden": 32, "first_dense": 1}},
    "qkv": {"ffn_hidden": 96, "attention": {"heads": 4, "bias": "qkv", "sinks": True}},
    "layer norms": {"ffn_hidden": 96, "norm": "layer", "head_bias": True, "mtp": {"depth": 1}},
    "zero-centred": {
        "ffn_hidden": 96,
        "norm": "rms_zero_centered",
        "tie_embeddings": True,
        "head_bias": True,
        "attention": {"heads": 4, "output_gate": True, "qk_norm": "head_after_rotary"},
    },
    "mla": {"ffn_hidden": 96, "attention": {"kind": "mla", "heads": 4, "q_lora_rank": 24}},
    "cosine": {"moe": {"experts": 8, "ffn_hidden": 32, "gate": {"kind": "cosine", "noise": "gaussian"}}},
    "hash": {"moe": {"experts": 8, "ffn_hidden": 32, "gate": "hash"}},
    "soft": {"moe": {"experts": 8, "ffn_hidden": 32, "gate": {"kind": "soft", "slots": 3}}},
    "smear": {"moe": {"experts": 8, "ffn_hidden": 32, "gate": "smear"}},
    "biased": {"moe": {"experts": 4, "ffn_hidden": 32, "bias": True, "gate": {"bias": True}}},
    "zero-computation": {
        "moe": {"experts": 8, "ffn_hidden": 32, "zero_experts": 1, "constant_experts": 2, "gate": {"bias": True}}
    },
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_weights_are_those_of_the_built_model(model):
    config = Config.model_validate({"model": {"hidden": 64, "layers": 4, **model}}).model
    with torch.device("meta"):
        built = Decoder(config, 320)
    told = {w.name: w.shape for w in weights(config, 320)}
    assert told == {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert parameters(config, 320)[0] == sum(p.numel() for p in built.parameters())
    assert {w.name: w.kind for w in weights(config, 320)} == what_they_are(built)


def what_they_are(built: Decoder) -> dict[str, str]:
    """By the modules that hold them, not by their names."""
    found = {}
    for path, module in built.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            norm = isinstance(module, (RMSNorm, LayerNorm)) and leaf == "weight"
            what = "norm" if norm else "bias" if "bias" in leaf else "matrix"
            what = "bias" if isinstance(module, Sinks) else what
            if isinstance(module, CosineProjection) and parameter.numel() == 1:
                what = "temperature"
            found[f"{path}.{leaf}"] = what
    return {name: found[name] for name, _ in built.named_parameters()}


# k = E, so that every expert sees every token and the count does not depend on the routing
COUNTED = {
    "top_k": {"experts": 2},
    "biased": {"experts": 2, "bias": True},
    "dense": {"experts": 3, "gate": "dense"},
    "soft": {"experts": 4, "gate": {"kind": "soft", "slots": 3}},
    "smear": {"experts": 4, "gate": "smear"},
    "hash": {"experts": 2, "gate": "hash"},
    "expert_choice": {"experts": 4, "gate": "expert_choice", "capacity_factor": 1.5},
}


@pytest.mark.parametrize("kind", COUNTED)
def test_flops_are_what_torch_counts(kind):
    raw = {"hidden": 64, "layers": 2, "attention": {"heads": 4}, "moe": {"ffn_hidden": 32, **COUNTED[kind]}}
    config = Config.model_validate({"model": raw}).model
    model = Decoder(config, 320)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sequence = 64
    # The fused attention is not counted by torch: use the plain one, which computes both triangles.
    tokens = torch.zeros(1, sequence, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, torch.stack([torch.arange(sequence)[None], tokens], -1))
    told = sum(flops_per_token(config, 320, sequence).values()) * sequence
    attention = 2 * 4 * 2 * 16 * sequence * sequence  # layers, heads, products, the size of a head
    assert told + attention == counter.get_total_flops()


def test_flops_of_multi_token_prediction_are_what_torch_counts():
    mtp = {"hidden": 64, "layers": 1, "attention": {"heads": 4}, "ffn_hidden": 96, "mtp": {"depth": 2}}
    config = Config.model_validate({"model": mtp}).model
    model, sequence = Decoder(config, 320), 16
    tokens = torch.zeros(1, sequence, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, torch.stack([torch.arange(sequence)[None], *[tokens] * 3], -1))
    flops = flops_per_token(config, 320, sequence)
    attention = 3 * 4 * 2 * 16 * sequence * sequence
    assert sum(flops.values()) * sequence + attention == counter.get_total_flops()
    assert flops["layers.1"] == flops["layers.2"] == flops["layers.0"] + 2 * 64 * 128
    assert flops["head"] == 3 * 2 * 64 * 320


def test_parameters_of_multi_token_prediction_are_told_apart():
    ahead = Config.model_validate({"model": {"hidden": 64, "layers": 4, **MODELS["ahead"]}}).model
    without = ahead.model_copy(update={"mtp": None})
    block = sum(w.numel for w in weights(without, 320) if w.layer == 3)
    total, active = prediction_parameters(ahead, 320)
    assert total == 2 * (block + 2 * 64 * 64 + 3 * 64)
    assert active == total - 2 * 2 * 3 * 64 * 32  # of 4 experts a token uses 2
    assert prediction_parameters(without, 320) == (0, 0)
