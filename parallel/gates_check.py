"""Rules between the keys of gates, their losses and capacity. Needs no torch."""

from __future__ import annotations

from moesys.config.schema import GateConfig, MoEConfig
from moesys.errors import Problem
from moesys.parallel.degrees import Degrees, divisors

RANDOM = {"noise", "jitter"}
GROUPS = {"groups", "groups_kept", "group_score"}
FORCED = {"force", "skew", "seed"}
USES: dict[str, set[str]] = {
    "top_k": {"score", "bias", "second"} | RANDOM | GROUPS | FORCED,
    "cosine": {"score", "dim", "second"} | RANDOM | GROUPS | FORCED,
    "prototype": {"bias"} | RANDOM | FORCED,
    "expert_choice": {"causal"},
    "sinkhorn": FORCED,
    "base": FORCED,
    "hash": {"table"} | FORCED,
    "random": FORCED,
    "dense": set(),
    "soft": {"slots"},
    "smear": set(),
    "replay": {"path"},
}
"""The keys of model.moe.gate that each kind uses."""

ZERO = {"zero_experts", "copy_experts", "constant_experts", "zero_variant", "zero_tau"}
CAPACITY = {"eval_capacity_factor", "min_capacity", "drop", "pad_to_capacity"}
BALANCE = {
    *("balance_loss", "sequence_balance_loss", "global_balance_loss", "balance_counts"),
    *("importance_loss", "load_loss", "bias_rate"),
}
WEIGHTS = {"normalize", "scale"}
FIXED = {"capacity_factor"} | CAPACITY | BALANCE | ZERO
NOT_LEARNED = {"z_loss"} | FIXED | WEIGHTS
IGNORES: dict[str, set[str]] = {
    "top_k": set(),
    "cosine": set(),
    "prototype": {"bias_rate", "load_loss", "balance_counts"} | ZERO,
    "expert_choice": CAPACITY | BALANCE | ZERO | WEIGHTS,
    "sinkhorn": FIXED | WEIGHTS,
    "base": FIXED | WEIGHTS,
    "hash": NOT_LEARNED,
    "random": NOT_LEARNED,
    "dense": {"top_k"} | FIXED | WEIGHTS,
    "soft": {"top_k"} | NOT_LEARNED,
    "smear": {"top_k"} | NOT_LEARNED,
    "replay": FIXED,
}
"""The keys of model.moe about routing that each kind does not use."""


def check(moe: MoEConfig) -> list[Problem]:
    """Every rule between them that `moe` breaks."""
    problems = [*_unused(moe), *_choices(moe), *_losses(moe), *_capacity(moe), *_zero(moe)]
    return problems


def spread(moe: MoEConfig, degrees: Degrees) -> list[Problem]:
    """What gates that need whole sequences, or all experts' weights, cannot be combined with."""
    kind = moe.gate.kind
    if kind not in ("soft", "smear"):
        return []
    reasons = {axis: "computes over whole sequences" for axis in ("cp", "tp")}
    if kind == "smear":
        reasons |= {axis: "merges the weights of all experts" for axis in ("ep", "etp")}
    return [
        Problem(f"parallel.{axis}", f"gate {kind} {reason}, which {axis}({size}) splits", f"set {axis}: 1")
        for axis, reason in reasons.items()
        if (size := getattr(degrees, axis)) > 1
    ]


def _unused(moe: MoEConfig) -> list[Problem]:
    kind, problems = moe.gate.kind, []
    for key, field in GateConfig.model_fields.items():
        if key != "kind" and key not in USES[kind] and getattr(moe.gate, key) != field.default:
            others = [name for name, keys in USES.items() if key in keys]
            rule = f"gate {kind} does not use it; {', '.join(others)} do" if others else f"gate {kind} does not use it"
            problems.append(Problem(f"model.moe.gate.{key}", rule, "remove it, or choose another gate"))
    for key in sorted(IGNORES[kind]):
        # A coefficient of 0 asks for nothing.
        if getattr(moe, key) not in (MoEConfig.model_fields[key].default, 0):
            rule = f"gate {kind} does not use it"
            problems.append(Problem(f"model.moe.{key}", rule, "remove it, or choose another gate"))
    return problems


def _choices(moe: MoEConfig) -> list[Problem]:
    gate, problems = moe.gate, []
    candidates = moe.experts + moe.zero_computation
    if gate.force != "skewed" and gate.skew != GateConfig.model_fields["skew"].default:
        problems.append(Problem("model.moe.gate.skew", f"force {gate.force} does not use it", "set force: skewed"))
    if gate.seed and gate.kind not in ("hash", "random") and gate.force != "skewed":
        rule = f"nothing is random by the token's number or id with gate {gate.kind} and force {gate.force}"
        problems.append(Problem("model.moe.gate.seed", rule, "remove it, or set force: skewed"))
    if gate.kind == "base" and moe.top_k != 1:
        rule = f"gate base assigns each token to one expert, and top_k is {moe.top_k}"
        problems.append(Problem("model.moe.top_k", rule, "set it to 1, or use gate sinkhorn"))
    if gate.kind == "replay" and gate.path is None:
        rule = "gate replay needs a recording"
        problems.append(Problem("model.moe.gate.path", rule, "set it to the folder runs/NAME/routing"))
    if gate.force != "none" and candidates >= moe.top_k > moe.experts:
        rule = f"force {gate.force} sends tokens to routed experts alone, and model.moe.experts is {moe.experts}"
        problems.append(Problem("model.moe.top_k", rule, f"choose 1 to {moe.experts}"))
    if (
        gate.kind in ("top_k", "cosine", "prototype")
        and gate.force == "none"
        and moe.top_k == 1 < candidates
        and moe.normalize
    ):
        rule = "one weight divided by itself is 1, with model.moe.top_k 1: the gate would not learn from what its "
        rule += "experts do"
        problems.append(Problem("model.moe.normalize", rule, "set normalize: false"))
    if moe.top_k > candidates:
        rule = f"must be at most model.moe.experts({moe.experts})"
        if moe.zero_computation:
            rule += f" + zero-computation experts({moe.zero_computation})"
        problems.append(Problem("model.moe.top_k", rule, f"choose 1 to {candidates}"))
    if gate.kind == "prototype" and moe.experts % moe.top_k:
        rule = f"gate prototype makes top_k({moe.top_k}) groups: it must divide model.moe.experts({moe.experts})"
        problems.append(Problem("model.moe.top_k", rule, f"one of {divisors(moe.experts)}"))
    if gate.second == "random" and moe.top_k != 2:
        rule = f"random is about the second of two experts, and model.moe.top_k is {moe.top_k}"
        problems.append(Problem("model.moe.gate.second", rule, "set model.moe.top_k: 2"))
    return problems + _groups(moe)


def _groups(moe: MoEConfig) -> list[Problem]:
    gate, problems = moe.gate, []
    if gate.groups_kept > gate.groups:
        rule = f"must be at most model.moe.gate.groups({gate.groups})"
        problems.append(Problem("model.moe.gate.groups_kept", rule, f"choose 1 to {gate.groups}"))
    if gate.groups == 1:
        return problems
    if moe.zero_computation:
        rule = f"zero-computation experts({moe.zero_computation}) belong to no group"
        problems.append(Problem("model.moe.gate.groups", rule, "use either"))
    if moe.experts % gate.groups:
        rule = f"must divide model.moe.experts({moe.experts})"
        return [*problems, Problem("model.moe.gate.groups", rule, f"one of {divisors(moe.experts)}")]
    size = moe.experts // gate.groups
    if moe.top_k > gate.groups_kept * size:
        most = gate.groups_kept * size
        rule = f"must be at most groups_kept({gate.groups_kept}) · experts per group({size}) = {most}"
        problems.append(Problem("model.moe.top_k", rule, "keep more groups, or choose fewer experts"))
    if gate.group_score == "top2" and size < 2:
        rule = f"needs two experts per group, and experts({moe.experts}) / groups({gate.groups}) is {size}"
        problems.append(Problem("model.moe.gate.group_score", rule, "use max, or fewer groups"))
    return problems


def _losses(moe: MoEConfig) -> list[Problem]:
    if not moe.load_loss:
        return []
    reasons = []
    if moe.gate.noise != "gaussian":
        reasons.append(("is the chance of a choice under noise", "set model.moe.gate.noise: gaussian"))
    if moe.gate.groups > 1 or moe.bias_rate:
        reasons.append(("is defined for the k largest logits alone", "use neither gate.groups nor bias_rate"))
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
            if getattr(moe, key) != MoEConfig.model_fields[key].default:
                rule = "needs zero_experts, copy_experts or constant_experts"
                problems.append(Problem(f"model.moe.{key}", rule, "remove it, or add some"))
    elif moe.zero_variant == "adamoe":
        if moe.importance_loss:
            rule = "adamoe's null experts have no weight: their importance is never that of the others"
            problems.append(Problem("model.moe.importance_loss", rule, "use balance_loss"))
        if computing := moe.copy_experts + moe.constant_experts:
            rule = f"adamoe has zero_experts alone, and copy_experts + constant_experts is {computing}"
            problems.append(Problem("model.moe.zero_variant", rule, "use moe++, or zero_experts alone"))
        if moe.zero_tau != 1.0:
            problems.append(Problem("model.moe.zero_tau", "adamoe does not use it", "remove it, or use moe++"))
    return problems
