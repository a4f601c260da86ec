"""The combinations that must compute what one process computes: every pair of dimensions, and more."""

from __future__ import annotations

from dataclasses import dataclass, field

PLAIN: dict = {}
DROPPING = {
    "tie_embeddings": True,
    "ffn_hidden": 96,
    "moe": {"capacity_factor": 1.0, "shared_experts": 1, "every": 2, "normalize": False},
}
LATENT = {
    "ffn_hidden": 96,
    "attention": {
        "kind": "mla", "heads": 4, "kv_heads": None, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "moe": {"first_dense": 1, "shared_experts": 2, "capacity_factor": 1.25, "drop": "position"},
}  # fmt: skip
UNEVEN = {"hidden": 65, "attention": {"bias": True, "head_dim": 16}}  # tp and data shards split the same dim
PATTERN = {
    "ffn_hidden": 96,
    "layers": {"count": 4, "first": ["attention dense"], "repeat": ["local moe", "wide dense"]},
    "mixers": {"local": {"heads": 4, "kv_heads": 2, "window": 5}, "wide": {"heads": 2, "head_dim": 24, "window": 16}},
}
"""A dense block, then windows that end within a context rank's chunk and beyond it, in heads of other sizes."""
AHEAD = {"ffn_hidden": 96, "mtp": {"depth": 2, "loss_weight": 0.6}, "moe": {"first_dense": 1, "shared_experts": 1}}
"""Blocks of multi-token prediction, which have experts like the last block."""
COUNTING = {**AHEAD, "moe": {**AHEAD["moe"], "global_balance_loss": 0.05}}
"""The same with a pass before each step, for the gates alone."""
RELEASED = {
    "layers": {"count": 4, "repeat": ["local moe", "attention moe"]},
    "norm": "layer",
    "head_bias": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "rope_scaling": {"kind": "yarn", "factor": 8.0, "original_seq_len": 16, "truncate": False},
    "attention": {
        "bias": "qkv", "sinks": True, "head_dim": 16, "rotary_fraction": 0.5, "softmax_scale": 0.3, "qk_norm": "full",
        "clip_qkv": 1.5, "output_gate": True,
    },
    "mixers": {
        "local": {
            "heads": 4, "kv_heads": 2, "bias": True, "sinks": True, "window": 5, "qk_norm": "head_after_rotary",
        },
    },
    "moe": {"selection_bias": True, "normalize_min": 0.9, "gate": {"score": "sigmoid"}},
}  # fmt: skip
"""Parts of released families: sinks, in windows too, stretched positions on a part of heads, gates, norms, biases."""
CENTERED = {
    **RELEASED,
    "norm": "rms_zero_centered",
    "head_bias": False,
    "logits_divisor": 2.0,
    "tie_embeddings": True,
}
NORMED = {"attention": {"qk_norm": "head", "head_dim": 32}, "moe": {"top_k": 1, "normalize": False, "experts": 8}}


@dataclass(frozen=True)
class Case:
    """A combination on `world` processes, with changes to the model and to training."""

    name: str
    world: int
    parallel: dict = field(hash=False)
    model: dict = field(default_factory=dict, hash=False)
    train: dict = field(default_factory=dict, hash=False)
    batch: int | None = None
    """Sequences of a step, over all ranks; None: two for each data rank, of which there may be four with one each."""

    @property
    def size(self) -> dict:
        """Changes to the configuration that make it as small as it can be and still show what it is to show."""
        p = self.parallel
        data = self.world // (p.get("tp", 1) * p.get("cp", 1) * p.get("pp", 1))
        layers = 4 if p.get("pp", 1) > 1 else 2  # a dense and an MoE layer, in every stage
        layers = self.model.get("layers", layers)
        return {"model": {"layers": layers}, "train": {"global_batch": self.batch or max(data, min(4, 2 * data))}}


FULL = {"dp_shard": "full"}
PAIRS = [
    Case("dp-tp", 4, {"tp": 2}, DROPPING),
    Case("dp-cp", 4, {"cp": 2}, LATENT),
    Case("dp-pp", 4, {"pp": 2}, DROPPING),
    Case("dp-ep", 4, {"ep": 2}),
    Case("dp-etp", 4, {"etp": 2}),
    Case("replicate-shard", 4, {"dp_shard": 2}, DROPPING),
    Case("shard-tp", 4, {**FULL, "tp": 2}, NORMED),
    Case("shard-tp-uneven", 4, {**FULL, "tp": 2, "ep": 4}, UNEVEN),
    Case("shard-cp", 4, {**FULL, "cp": 2}, DROPPING),
    Case("shard-pp", 4, {**FULL, "pp": 2}, DROPPING),
    Case("shard-ep", 4, {**FULL, "ep": 2}, LATENT),
    Case("shard-etp", 4, {**FULL, "etp": 2}),
    Case("tp-cp", 4, {"tp": 2, "cp": 2}, LATENT),
    Case("tp-pp", 4, {"tp": 2, "pp": 2}, LATENT),
    Case("tp-ep", 2, {"tp": 2, "ep": 2}, DROPPING),
    Case("tp-etp", 2, {"tp": 2, "etp": 2}, NORMED),
    Case("tp-without-sp", 2, {"tp": 2, "sp": False, "ep": 2}, DROPPING),
    Case("cp-pp", 4, {"cp": 2, "pp": 2}),
    Case("cp-ep", 2, {"cp": 2, "ep": 2}, DROPPING),
    Case("cp-etp", 2, {"cp": 2, "etp": 2}),
    Case("pp-ep", 4, {"pp": 2, "ep": 2}, LATENT),
    Case("pp-etp", 4, {"pp": 2, "etp": 2}, DROPPING),
    Case("ep-etp", 4, {"ep": 2, "etp": 2}, DROPPING),
]
MORE = [
    Case("gpipe-dp-ep", 4, {"pp": 2, "pp_schedule": "gpipe", "ep": 2}, DROPPING, {"micro_batch": 2}),
    Case("interleaved-shard-ep", 4, {**FULL, "pp": 2, "pp_virtual": 2, "pp_schedule": "interleaved-1f1b", "ep": 2}),
    Case("zero-bubble-dp-ep", 4, {"pp": 2, "pp_virtual": 2, "pp_schedule": "zero-bubble", "ep": 2}, DROPPING),
    Case("pp-shard-tp-ep", 8, {**FULL, "pp": 2, "tp": 2, "ep": 4}, DROPPING),
    Case("shard-tp-cp-ep", 8, {**FULL, "tp": 2, "cp": 2, "ep": 4}, LATENT),
    Case("pp-tp-cp-etp", 8, {"pp": 2, "tp": 2, "cp": 2, "etp": 2, "ep": 2}, DROPPING),
    Case("hybrid-tp-ep", 8, {"dp_shard": 2, "tp": 2, "ep": 2}, DROPPING, {"recompute": "full"}),
    Case("pattern-cp-ep", 2, {"cp": 2, "ep": 2}, PATTERN, {"recompute": "selective"}),
    Case("released-cp-tp", 4, {"cp": 2, "tp": 2}, RELEASED, {"recompute": "selective"}),
    Case("released-pp-shard-tp", 8, {**FULL, "pp": 2, "tp": 2, "sp": False}, CENTERED),
    Case("released-shard-ep", 2, {**FULL, "ep": 2}, RELEASED, {"recompute": "full"}),
    Case("pattern-pp-shard-tp", 8, {**FULL, "pp": 2, "tp": 2}, PATTERN),
    Case("each-shard-ep", 2, {**FULL, "sync_gradients": "each", "ep": 2}, DROPPING),
    Case("each-hybrid-tp", 8, {"dp_shard": 2, "sync_gradients": "each", "tp": 2}, LATENT, batch=8),
    Case("each-pp-shard-ep", 4, {**FULL, "sync_gradients": "each", "pp": 2, "ep": 2}),
    Case("ahead-shard-ep", 2, {**FULL, "ep": 2}, AHEAD, {"recompute": "full"}),
    Case("ahead-tp-cp", 4, {"tp": 2, "cp": 2, "etp": 2}, COUNTING, {"recompute": "selective"}),
    Case("ahead-pp-ep", 4, {"pp": 2, "ep": 2}, COUNTING),
    Case("ahead-tied-pp", 2, {"pp": 2}, {**AHEAD, "tie_embeddings": True}, {"recompute": "full"}),
    Case("ahead-zero-bubble", 2, {"pp": 2, "pp_schedule": "zero-bubble"}, {"mtp": {}}),
    Case("dp-ep-selective", 2, {"ep": 2}, LATENT, {"recompute": "selective"}),
    Case("shard-ep-full", 2, {**FULL, "ep": 2}, PLAIN, {"recompute": "full", "micro_batch": 2}),
]
