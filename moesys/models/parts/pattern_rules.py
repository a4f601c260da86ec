"""Rules between a pattern of layers and the mixers and feed-forwards that it names; needs no torch."""

from __future__ import annotations

from moesys.config.schema import ModelConfig, MoEConfig, PatternConfig
from moesys.config.suggest import nearest
from moesys.errors import Problem


def check(model: ModelConfig) -> list[Problem]:
    """Every rule that a pattern breaks."""
    pattern = model.layers
    if isinstance(pattern, int):
        rule = "are for a pattern of layers, and model.layers is a number"
        remedy = "set model.layers: {count: N, repeat: [NAME dense, …]}, or remove them"
        return [Problem("model.mixers", rule, remedy)] if model.mixers else []
    return _names(model, pattern) + _moe(model, pattern)


def _names(model: ModelConfig, pattern: PatternConfig) -> list[Problem]:
    problems, known = [], ["attention", *model.mixers]
    if "attention" in model.mixers:
        rule = "attention is the word for the section model.attention"
        problems.append(Problem("model.mixers.attention", rule, "choose another name"))
    for key in ("first", "repeat"):
        for words in getattr(pattern, key):
            name = words.partition(" ")[0]
            if name not in known:
                near = nearest(name, known)
                remedy = f"did you mean {near}?" if near else f"add model.mixers.{name}, or use {' or '.join(known)}"
                problems.append(Problem(f"model.layers.{key}", f"there is no mixer {name}", remedy))
    if len(pattern.first) > pattern.count:
        rule = f"holds {len(pattern.first)} blocks, more than count({pattern.count})"
        problems.append(Problem("model.layers.first", rule, "give count or fewer"))
    used = {pattern.block(layer)[0] for layer in range(pattern.count)}
    for name in model.mixers:
        if name not in used and not problems:
            rule = "no block of the pattern uses it"
            problems.append(Problem(f"model.mixers.{name}", rule, "use it in model.layers, or remove it"))
    return problems


def _moe(model: ModelConfig, pattern: PatternConfig) -> list[Problem]:
    blocks = [pattern.block(layer)[1] for layer in range(pattern.count)]
    if model.moe is None:
        if "moe" not in blocks:
            return []
        rule = "has MoE blocks, and model.moe is absent"
        return [Problem("model.layers", rule, "add model.moe, or use dense")]
    problems = []
    if "moe" not in blocks:
        problems.append(
            Problem("model.layers", "has no MoE block, and there is model.moe", "use moe, or remove model.moe")
        )
    for key in ("every", "first_dense"):
        if getattr(model.moe, key) != MoEConfig.model_fields[key].default:
            rule = "the pattern of model.layers says which blocks are MoE"
            problems.append(Problem(f"model.moe.{key}", rule, "remove it"))
    return problems
