"""Rules between the keys of shared experts; needs no torch."""

from __future__ import annotations

from moesys.config.schema import MoEConfig
from moesys.errors import Problem


def check(moe: MoEConfig) -> list[Problem]:
    """Keys of shared experts that have no meaning beside the others."""
    problems = []
    if moe.shared_mix != "add" and not moe.shared_experts:
        rule = f"{moe.shared_mix} needs shared experts, and model.moe.shared_experts is 0"
        problems.append(Problem("model.moe.shared_mix", rule, "set shared_experts, or shared_mix: add"))
    if moe.shared_ffn_hidden is not None and not moe.shared_experts:
        rule = f"({moe.shared_ffn_hidden}) has no meaning: model.moe.shared_experts is 0"
        problems.append(Problem("model.moe.shared_ffn_hidden", rule, "set shared_experts, or remove it"))
    for key in ("cmr_budget", "cmr_loss"):
        value = getattr(moe, key)
        if moe.shared_mix != "cmr" and value != MoEConfig.model_fields[key].default:
            rule = f"({value}) belongs to shared_mix: cmr, and shared_mix is {moe.shared_mix}"
            problems.append(Problem(f"model.moe.{key}", rule, "set shared_mix: cmr, or remove it"))
    return problems
