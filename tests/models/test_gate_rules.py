"""What gates' keys must not say together."""

from __future__ import annotations

import pytest

from moesys.config.registry import GATES, kinds
from moesys.config.schema import MoEConfig
from moesys.models.parts.gates.cosine import START as described_start
from moesys.models.parts.gates.rules import check
from moesys.moe.gates import cosine

MISTAKES = {
    "a key of another kind": ({"gate": {"groups": 2, "kind": "prototype"}}, "groups", "cosine, top_k do"),
    "bias of cosines": ({"gate": {"bias": True, "kind": "cosine"}}, "gate.bias", "gate cosine does not use it"),
    "a loss-free prototype": ({"gate": "prototype", "bias_rate": 0.1}, "bias_rate", "gate prototype does not use it"),
    "prototypes that do not divide": (
        {"gate": "prototype", "top_k": 3},
        "top_k",
        "makes top_k(3) groups: it must divide model.moe.experts(8)",
    ),
    "k beyond all candidates": (
        {"top_k": 11, "zero_experts": 2},
        "top_k",
        "at most model.moe.experts(8) + zero-computation experts(2)",
    ),
    "random second of three": ({"top_k": 3, "gate": {"second": "random"}}, "gate.second", "model.moe.top_k is 3"),
    "more groups kept than there are": ({"gate": {"groups": 2, "groups_kept": 3}}, "groups_kept", "groups(2)"),
    "groups that do not divide": ({"gate": {"groups": 3}}, "groups", "must divide model.moe.experts(8)"),
    "k beyond the groups kept": (
        {"top_k": 3, "gate": {"groups": 4}},
        "top_k",
        "groups_kept(1) · experts per group(2) = 2",
    ),
    "no two best": (
        {"top_k": 1, "normalize": False, "gate": {"groups": 8, "group_score": "top2"}},
        "group_score",
        "experts(8) / groups(8) is 1",
    ),
    "zero experts in groups": ({"zero_experts": 2, "gate": {"groups": 2}}, "gate.groups", "experts(2) belong to no"),
    "load without noise": ({"load_loss": 0.1}, "load_loss", "chance of a choice under noise"),
    "load without choice": ({"load_loss": 0.1, "top_k": 8, "gate": {"noise": "gaussian"}}, "load_loss", "top_k(8)"),
    "load with a bias": (
        {"load_loss": 0.1, "bias_rate": 0.1, "gate": {"noise": "gaussian"}},
        "load_loss",
        "k largest logits alone",
    ),
    "one weight of one": ({"top_k": 1}, "moe.normalize", "with model.moe.top_k 1: the gate would not learn"),
    "force beyond the routed": (
        {"experts": 2, "top_k": 3, "zero_experts": 2, "gate": {"force": "skewed"}},
        "top_k",
        "to routed experts alone, and model.moe.experts is 2",
    ),
    "importance of nulls": (
        {"zero_experts": 2, "zero_variant": "adamoe", "importance_loss": 0.1},
        "importance_loss",
        "null experts have no weight",
    ),
    "counts without losses": (
        {"gate": "base", "top_k": 1, "balance_counts": "first"},
        "balance_counts",
        "gate base does not use it",
    ),
    "padding without capacity": ({"pad_to_capacity": True}, "pad_to_capacity", "capacity_factor, which is null"),
    "minimum without capacity": ({"min_capacity": 4}, "min_capacity", "capacity_factor, which is null"),
    "a variant of nothing": ({"zero_variant": "adamoe"}, "zero_variant", "needs zero_experts"),
    "adamoe that copies": ({"zero_variant": "adamoe", "copy_experts": 1}, "zero_variant", "constant_experts is 1"),
    "a causal top_k": ({"gate": {"causal": True}}, "gate.causal", "gate top_k does not use it; expert_choice do"),
    "slots of hashes": ({"gate": {"kind": "hash", "slots": 2}}, "gate.slots", "gate hash does not use it; soft do"),
    "a loss without logits": ({"gate": "random", "z_loss": 0.1}, "z_loss", "gate random does not use it"),
    "a balanced balance": ({"gate": "sinkhorn", "balance_loss": 0.1}, "balance_loss", "gate sinkhorn does not use it"),
    "k of all": ({"gate": "dense", "top_k": 3}, "top_k", "gate dense does not use it"),
    "base for two": ({"gate": "base"}, "top_k", "assigns each token to one expert, and top_k is 2"),
    "nothing to replay": ({"gate": "replay"}, "gate.path", "gate replay needs a recording"),
    "force without a choice": (
        {"gate": {"kind": "expert_choice", "force": "balanced"}},
        "gate.force",
        "gate expert_choice does not use it",
    ),
    "skew in balance": ({"gate": {"force": "balanced", "skew": 2.0}}, "gate.skew", "force balanced does not use it"),
    "a seed of nothing": ({"gate": {"seed": 3}}, "gate.seed", "nothing is random by the token's number"),
    "adamoe with tau": ({"zero_variant": "adamoe", "zero_experts": 1, "zero_tau": 0.5}, "zero_tau", "adamoe does not"),
}


def problems(**change) -> list[str]:
    return [str(p) for p in check(MoEConfig.model_validate({"experts": 8, "ffn_hidden": 4, **change}))]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_key_and_numbers(name):
    change, key, rule = MISTAKES[name]
    (told,) = problems(**change)
    assert key in told.split(":")[0] and rule in told


GOOD = [
    {},
    {"gate": {"noise": "gaussian"}, "load_loss": 0.1, "importance_loss": 0.1},
    {"gate": {"score": "sigmoid", "groups": 4, "groups_kept": 2, "group_score": "top2"}, "bias_rate": 1e-3},
    {"gate": {"kind": "cosine", "dim": 4, "second": "random"}},
    {"gate": {"kind": "prototype", "bias": True, "jitter": 0.01}, "normalize": False},
    {"top_k": 10, "zero_experts": 1, "copy_experts": 1, "constant_experts": 1, "zero_tau": 0.75},
    {"eval_capacity_factor": 1.0, "min_capacity": 2},
    {"gate": {"kind": "expert_choice", "causal": True}, "capacity_factor": 1.25, "z_loss": 0.1},
    {"gate": {"kind": "base", "force": "skewed", "skew": 0.5, "seed": 2}, "top_k": 1},
    {"gate": {"kind": "hash", "table": "balanced", "seed": 1}},
    {"gate": {"kind": "soft", "slots": 4}},
    {"gate": {"kind": "replay", "path": "runs/a/routing"}, "normalize": False, "scale": 2.5},
]


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_what_goes_together_is_let_through(change):
    assert problems(**change) == []


def test_kinds_ignore_keys_that_there_are():
    for described in kinds(GATES).values():
        assert described.ignores <= set(MoEConfig.model_fields)


def test_the_temperature_starts_as_its_description_says():
    assert described_start == cosine.START
