"""Rules between the keys of gates, their losses and capacity. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.errors import Problem
from moesys.models.parts.gates.kind import unused

if TYPE_CHECKING:
    from moesys.config.schema import MoEConfig


def check(moe: MoEConfig) -> list[Problem]:
    """Every rule between them that `moe` breaks."""
    return [*unused(moe), *_choices(moe), *_losses(moe), *_capacity(moe), *_zero(moe)]


def _choices(moe: MoEConfig) -> list[Problem]:
    gate, router, problems = moe.gate, moe.router, []
    if gate.force != "skewed" and gate.skew != type(gate).model_fields["skew"].default:
        problems.append(Problem("model.moe.gate.skew", f"force {gate.force} does not use it", "set force: skewed"))
    if gate.seed and not router.seeded and gate.force != "skewed":
        rule = f"nothing is random by the token's number or id with gate {gate.kind} and force {gate.force}"
        problems.append(Problem("model.moe.gate.seed", rule, "remove it, or set force: skewed"))
    if gate.force != "none" and router.candidates >= moe.top_k > moe.experts:
        rule = f"force {gate.force} sends tokens to routed experts alone, and model.moe.experts is {moe.experts}"
        problems.append(Problem("model.moe.top_k", rule, f"choose 1 to {moe.experts}"))
    if moe.top_k > router.candidates:
        rule = f"must be at most model.moe.experts({moe.experts})"
        if moe.zero_computation:
            rule += f" + zero-computation experts({moe.zero_computation})"
        problems.append(Problem("model.moe.top_k", rule, f"choose 1 to {router.candidates}"))
    return problems + router.check()


def _losses(moe: MoEConfig) -> list[Problem]:
    if not moe.load_loss:
        return []
    reasons = []
    if moe.gate.noise != "gaussian":
        reasons.append(("is the chance of a choice under noise", "set model.moe.gate.noise: gaussian"))
    if moe.gate.groups > 1 or moe.bias_rate or moe.selection_bias:
        why = "use neither gate.groups nor bias_rate nor selection_bias"
        reasons.append(("is defined for the k largest logits alone", why))
    if moe.top_k >= moe.experts + moe.zero_computation:
        reasons.append((f"top_k({moe.top_k}) takes every expert: there is no choice", "lower model.moe.top_k"))
    return [Problem("model.moe.load_loss", rule, remedy) for rule, remedy in reasons]


def _capacity(moe: MoEConfig) -> list[Problem]:
    if moe.capacity_factor is not None:
        return []
    keys = ["pad_to_capacity"] if moe.pad_to_capacity else []
    if moe.min_capacity and moe.eval_capacity_factor is None:
        keys.append("min_capacity")
    rule = "needs model.moe.capacity_factor, which is null: experts have no capacity"
    return [Problem(f"model.moe.{key}", rule, "set capacity_factor") for key in keys]


def _zero(moe: MoEConfig) -> list[Problem]:
    problems = []
    if not moe.zero_computation:
        for key in ("zero_variant", "zero_tau"):
            if getattr(moe, key) != type(moe).model_fields[key].default:
                rule = "needs zero_experts, copy_experts or constant_experts"
                problems.append(Problem(f"model.moe.{key}", rule, "remove it, or add some"))
    elif moe.zero_variant == "adamoe":
        if moe.importance_loss:
            rule = "adamoe's null experts have no weight: their importance is never that of the others"
            problems.append(Problem("model.moe.importance_loss", rule, "use balance_loss"))
        if computing := moe.copy_experts + moe.constant_experts:
            rule = f"adamoe has zero_experts alone, and copy_experts + constant_experts is {computing}"
            problems.append(Problem("model.moe.zero_variant", rule, "use moe++, or zero_experts alone"))
        if moe.normalize_min:
            rule = "adamoe normalises the weights of true experts alone, and does not use it"
            problems.append(Problem("model.moe.normalize_min", rule, "remove it, or use moe++"))
        if moe.zero_tau != 1.0:
            problems.append(Problem("model.moe.zero_tau", "adamoe does not use it", "remove it, or use moe++"))
    return problems
