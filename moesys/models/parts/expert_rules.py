"""Rules between the keys of shared experts and of LoRA experts; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.errors import Problem

if TYPE_CHECKING:
    from moesys.config.schema import MoEConfig


def check(moe: MoEConfig, hidden: int) -> list[Problem]:
    """Every rule between them that `moe` breaks, in a stream of size `hidden`."""
    return _shared(moe) + _lora(moe, hidden)


def _shared(moe: MoEConfig) -> list[Problem]:
    problems = []
    if moe.shared_mix != "add" and not moe.shared_experts:
        rule = f"{moe.shared_mix} needs shared experts, and model.moe.shared_experts is 0"
        problems.append(Problem("model.moe.shared_mix", rule, "set shared_experts, or shared_mix: add"))
    if moe.shared_ffn_hidden is not None and not moe.shared_experts:
        rule = f"({moe.shared_ffn_hidden}) has no meaning: model.moe.shared_experts is 0"
        problems.append(Problem("model.moe.shared_ffn_hidden", rule, "set shared_experts, or remove it"))
    for key in ("cmr_budget", "cmr_loss"):
        value = getattr(moe, key)
        if moe.shared_mix != "cmr" and value != type(moe).model_fields[key].default:
            rule = f"({value}) belongs to shared_mix: cmr, and shared_mix is {moe.shared_mix}"
            problems.append(Problem(f"model.moe.{key}", rule, "set shared_mix: cmr, or remove it"))
    return problems


def _lora(moe: MoEConfig, hidden: int) -> list[Problem]:
    problems = []
    if moe.lora_rank is None:
        if moe.lora_alpha is not None:
            rule = f"({moe.lora_alpha:g}) has no meaning: model.moe.lora_rank is not set"
            problems.append(Problem("model.moe.lora_alpha", rule, "set lora_rank, or remove it"))
        return problems
    smallest = min(hidden, moe.ffn_hidden)
    if moe.lora_rank > smallest:
        rule = f"({moe.lora_rank}) must be at most {smallest}, the smaller size of the matrices that it changes"
        problems.append(Problem("model.moe.lora_rank", rule, f"choose 1 to {smallest}"))
    if moe.bias:
        rule = "true has no meaning with lora_rank: LoRA experts change matrices, and have no biases"
        problems.append(Problem("model.moe.bias", rule, "set it to false, or remove lora_rank"))
    if "ep" in moe.router.whole:
        rule = f"{moe.gate.kind} mixes whole experts: a mixture of changes of rank {moe.lora_rank} has a higher rank"
        problems.append(Problem("model.moe.lora_rank", rule, "remove it, or choose another gate"))
    return problems
