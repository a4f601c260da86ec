"""With `train.compile` every block is compiled: so many graphs, and no graph ends before its part does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import alone, compiled
from torch import Tensor

from moesys.models.attention import CausalCore
from moesys.moe.layer import MoELayer, RoutedTokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # torch.compile's own, in graphs after graphs
    pytest.mark.filterwarnings("ignore:Set timeout"),  # of groups that are none
]

DENSE: dict[str, Any] = {"ffn_hidden": 16}
MLA = {
    "kind": "mla", "heads": 2, "kv_heads": None, "head_dim": None, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


RELEASED = {
    "heads": 2, "kv_heads": 2, "head_dim": 8, "window": 3, "output_gate": True, "qk_norm": "full",
    "clip_qkv": 1.0, "rotary_fraction": 0.5, "bias": "qkv",
}  # fmt: skip


def moe(**options: Any) -> dict[str, Any]:
    return {"moe": {"experts": 4, "top_k": 2, "ffn_hidden": 8, **options}}


PLAIN = moe(balance_loss=0.02, z_loss=0.001)
SHARED = moe(shared_experts=1, shared_mix="gate", sequence_balance_loss=0.01)
WHOLE = "route 1, run_experts 1, breaks 0"
TRAVELS = "route 1, finish 1, breaks 0"

# name: (model, parallel, graphs of two blocks alike in any mode of recomputation)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dense": (DENSE, {}, "run_dense 1, breaks 0"),
    "dense and MoE": (DENSE | moe(every=2), {}, "run_dense 1, route 1, run_experts 1, breaks 0"),
    "top_k": (PLAIN, {}, WHOLE),
    "latent attention": (moe() | {"attention": MLA}, {}, WHOLE),
    "shared experts": (SHARED, {}, WHOLE),
    "zero-computation experts": (moe(zero_experts=1, copy_experts=1, constant_experts=1), {}, TRAVELS),
    "low rank": (moe(lora_rank=2), {}, WHOLE),
    "capacity": (moe(capacity_factor=0.5), {}, TRAVELS),
    "padded": (moe(capacity_factor=0.5, pad_to_capacity=True), {}, WHOLE),
    "noise": (moe(gate={"noise": "gaussian", "jitter": 0.1, "second": "random"}), {}, "route 2, finish 1, breaks 0"),
    "expert choice": (moe(gate="expert_choice"), {}, TRAVELS),
    "sinkhorn": (moe(gate="sinkhorn"), {}, WHOLE),
    "base": (moe(gate="base", top_k=1), {}, WHOLE),
    "sparsemixer": (moe(gate="sparsemixer"), {}, "route 2, run_experts 1, breaks 0"),
    "hash": (moe(gate="hash"), {}, "route 2, run_experts 1, breaks 0"),
    "soft": (moe(gate="soft", top_k=1), {}, WHOLE),
    "smear": (moe(gate="smear", top_k=1), {}, WHOLE),
    "dense gate": (moe(gate="dense", top_k=4), {}, WHOLE),
    "tp and sp": (
        DENSE | SHARED | moe(every=2, shared_experts=1),
        {"tp": 2},
        "run_dense 1, route 1, run_experts 1, breaks 0",
    ),
    "tp and parts of released families": (
        DENSE | {"attention": RELEASED, "norm": "layer", "residual_multiplier": 0.5},
        {"tp": 2},
        "run_dense 1, breaks 0",
    ),
    "tp alone": (PLAIN, {"tp": 2, "sp": False}, WHOLE),
    "cp": (PLAIN, {"cp": 2}, WHOLE),
    "ep": (PLAIN, {"ep": 2}, TRAVELS),
    "ep, shared experts": (SHARED, {"ep": 2}, "route 1, run_shared 1, finish 1, breaks 0"),
    "tp and ep": (PLAIN, {"tp": 2, "ep": 2}, TRAVELS),
    "dp_shard": (PLAIN, {"dp_shard": 2}, TRAVELS),
}

MODES = {
    "top_k": ("none", "selective", "full"),
    "ep, shared experts": ("none", "selective", "full"),
    "dense": ("full",),
}
"""How a case is compiled if not with `selective`, which has the most to lose: its graphs are checkpointed."""


@pytest.mark.parametrize(
    ("name", "recompute"), [(name, mode) for name in CASES for mode in MODES.get(name, ("selective",))]
)
def test_every_part_is_one_graph_whatever_is_routed_where(name: str, recompute: str) -> None:
    model, parallel, budget = CASES[name]
    world = 2 if parallel else 1
    with alone(world):
        graphs, after, _ = compiled({"model": model, "parallel": parallel, "train": {"recompute": recompute}}, world)
    assert after == [budget] * 3, "three steps, of which each routes its own tokens"
    for part in graphs.made.keys() & {"route", "run_dense"}:
        inside = graphs.inside[part]
        assert {"scaled_dot_product_attention", "linear"} <= inside
        assert any(name.startswith("rsqrt") or "rms_norm" in name for name in inside), "a norm"
    if "route" in graphs.made and name != "hash":  # whose gate has no weights
        assert any("ffn_modules_gate_modules_projection" in inside for inside in graphs.inside["route"]), "a gate"
    if "run_experts" in graphs.made and "lora_rank" not in model["moe"]:
        assert "expert_ffn" in graphs.inside["run_experts"]


def _asks(self: CausalCore, q: Tensor, k: Tensor, v: Tensor, sinks: None = None) -> Tensor:
    if q.sum().item() > 1e9:
        raise AssertionError
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_graph_that_breaks_is_found(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    monkeypatch.setattr(CausalCore, "forward", _asks)
    with alone(1):
        graphs, after, _ = compiled({"model": PLAIN, "train": {"recompute": recompute}}, 1)
    assert after[0] != WHOLE and "breaks 0" not in after[0]
    # Between breaks pieces are compiled; inside of a checkpoint nothing is.
    assert "route" not in graphs.made and (recompute == "selective") == ("elsewhere" not in graphs.made)


def test_a_side_effect_in_a_part_loses_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    route = MoELayer.route

    def counting(self: MoELayer, x: Tensor, tokens: Tensor | None) -> RoutedTokens:
        routed = route(self, x, tokens)
        self.count(routed)
        return routed

    monkeypatch.setattr(MoELayer, "route", counting)
    with alone(1):
        graphs, _, _ = compiled({"model": PLAIN, "train": {"recompute": "selective"}}, 1)
    assert "route" not in graphs.made
