"""What a model keeps for backward on one device, beside the estimate."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kept import Allocated, storage

from moesys.config import Config
from moesys.kernels.cpu import memory_pool
from moesys.models.decoder import Decoder
from moesys.parallel.activations import activations
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape
from moesys.parallel.loss import TokenLoss
from moesys.parallel.recompute import prepare

HOW = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "selective")]
MLA = {"kind": "mla", "heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
MODELS = {
    "dense": {"ffn_hidden": 1024, "attention": {"heads": 4, "kv_heads": 2}},
    "norms": {"ffn_hidden": 512, "attention": {"heads": 4, "head_dim": 128, "qk_norm": "full", "bias": True}},
    "window": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2, "window": 32, "qk_norm": "head"}},
    "options": {
        "ffn_hidden": 512,
        "norm": "layer",
        "attention": {
            **{"heads": 4, "kv_heads": 2, "qk_norm": "head_after_rotary"},
            **{"output_gate": True, "sinks": True, "clip_qkv": 5.0, "rotary_fraction": 0.5},
        },
    },
    "moe": {"moe": {"experts": 8, "top_k": 2, "ffn_hidden": 512}},
    "fine": {"moe": {"experts": 16, "top_k": 4, "ffn_hidden": 64, "shared_experts": 2}},
    "lora": {"moe": {"experts": 8, "top_k": 2, "ffn_hidden": 512, "lora_rank": 8}},
    "bias": {"moe": {"experts": 8, "top_k": 2, "ffn_hidden": 256, "bias": True, "activation": "clipped_swiglu"}},
    "mixed": {
        "moe": {"experts": 8, "ffn_hidden": 256, "shared_experts": 2, "shared_mix": "residual", "activation": "gelu"}
    },
    "reduced": {"moe": {"experts": 8, "ffn_hidden": 256, "shared_experts": 1, "shared_mix": "cmr"}},
    "jitter": {"moe": {"experts": 8, "ffn_hidden": 256, "gate": {"kind": "cosine", "jitter": 0.1}}},
    "soft": {"moe": {"experts": 8, "ffn_hidden": 256, "gate": {"kind": "soft", "slots": 32}}},
    "smear": {"moe": {"experts": 8, "ffn_hidden": 256, "gate": "smear"}},
    "zero": {"moe": {"experts": 8, "ffn_hidden": 256, "copy_experts": 1, "constant_experts": 2}},
    "latent": {"ffn_hidden": 1024, "attention": MLA},
    "ahead": {"ffn_hidden": 512, "mtp": {"depth": 2}},
    "ranks": {"ffn_hidden": 512, "attention": {**MLA, "q_lora_rank": 96}},
}


CASES = [*product(MODELS, HOW), *((name, ("bfloat16", "full")) for name in ("dense", "moe", "ahead"))]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_activations_are_what_is_kept(name, how):
    model, (dtype, recompute) = MODELS[name], how
    sequence, batch, vocabulary = 128, 2, 320
    config = Config.model_validate(
        {
            "model": {"hidden": 256, "layers": 2, **model},
            "train": {
                **{"seq_len": sequence, "micro_batch": batch, "global_batch": batch},
                **{"dtype": dtype, "recompute": recompute},
            },
            "cluster": {"device": "cpu"},
        }
    )
    torch.manual_seed(0)
    built = Decoder(config.model, vocabulary, getattr(torch, dtype))
    for block in built.blocks():
        prepare(block, recompute, False)
    depth = config.model.predicted
    tokens = torch.randint(0, vocabulary, (batch, sequence, 2 + depth))  # number, id, and the ids that follow
    labels = torch.zeros(batch, 1 + depth, sequence, dtype=torch.int64)
    with torch.no_grad():
        built(tokens[..., 1], tokens)  # it keeps its tables of positions
    with memory_pool.recorded(), Allocated() as allocated:
        loss = TokenLoss(batch * sequence, weights=[0.1] * depth)(built(tokens[..., 1], tokens), labels)
        sizes = allocated.alive({storage(p) for p in built.parameters()})
    degrees, _ = resolve(config)
    estimate, measured = activations(step_shape(config, degrees, vocabulary, 0)), sum(sizes.values())
    largest = "\n".join(f"    {size:10} bytes of {name}" for name, size in sorted(sizes.items(), key=lambda x: -x[1]))
    assert estimate == pytest.approx(measured, rel=0.1), f"estimated {estimate:.0f}, kept {measured}:\n{largest}"
    assert loss.requires_grad
