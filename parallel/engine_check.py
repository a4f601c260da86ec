"""What `engine: megatron` cannot do of what a configuration may ask for. Needs no torch, and no Megatron."""

from __future__ import annotations

from dataclasses import replace

from moesys.config.schema import Config
from moesys.errors import Problem
from moesys.models.parts.model import mixers
from moesys.parallel.degrees import Degrees

NATIVE = "set engine: native"

NATIVE_ONLY = {
    "rope_scaling": "stretched rotary positions are",
    "norm": "another norm than rms is",
    "head_bias": "a bias on the logits is",
    "embedding_multiplier": "a factor on the embedding is",
    "residual_multiplier": "a factor on branches is",
    "logits_divisor": "a divisor of the logits is",
}
"""Keys of the model that must have their defaults, in words."""


def check(config: Config, degrees: Degrees) -> list[Problem]:
    """Rules of Megatron-Core's engine, beside those of the dimensions, which hold for it too."""
    if config.engine == "native":
        return []
    return _layout(config, degrees) + _model(config, degrees) + _training(config)


def _layout(config: Config, degrees: Degrees) -> list[Problem]:
    p, problems = config.parallel, []
    if p.cp > 1:
        rule = "Megatron's context parallelism needs Transformer Engine: it is not in engine: megatron"
        problems.append(Problem("parallel.cp", rule, f"set cp: 1, or {NATIVE}"))
    if p.pp > 1 and p.pp_schedule not in ("1f1b", "interleaved-1f1b"):
        rule = "Megatron's schedules are 1f1b and interleaved-1f1b"
        problems.append(Problem("parallel.pp_schedule", rule, f"choose one of these, or {NATIVE}"))
    if 1 < degrees.dp_shard < degrees.dp:
        rule = f"Megatron's distributed optimizer is over all data ranks ({degrees.dp}) or none"
        problems.append(Problem("parallel.dp_shard", rule, f"set it to 1 or full, or {NATIVE}"))
    if p.sync_gradients == "each":
        rule = "Megatron keeps whole gradients between micro-batches"
        problems.append(Problem("parallel.sync_gradients", rule, f"set it to auto or once, or {NATIVE}"))
    if p.tp > 1 and not p.sp and config.model.moe is not None:
        rule = "Megatron trains MoE layers over tensor ranks with sequence parallelism alone"
        problems.append(Problem("parallel.sp", rule, f"set sp: true, or {NATIVE}"))
    return problems


def _model(config: Config, degrees: Degrees) -> list[Problem]:
    moe = config.model.moe
    refused = [problem for mixer in mixers(config.model) for problem in mixer.megatron()]
    problems = [replace(problem, remedy=f"{problem.remedy}, or {NATIVE}") for problem in refused]
    for key, words in NATIVE_ONLY.items():
        if getattr(config.model, key) != type(config.model).model_fields[key].default:
            rule = f"{words} not in engine: megatron"
            problems.append(Problem(f"model.{key}", rule, f"remove it, or {NATIVE}"))
    if not isinstance(config.model.layers, int):
        rule = "a pattern of layers is not in engine: megatron"
        problems.append(Problem("model.layers", rule, f"give a number, or {NATIVE}"))
    if config.model.mtp is not None:
        rule = "multi-token prediction is not in engine: megatron"
        problems.append(Problem("model.mtp", rule, f"remove it, or {NATIVE}"))
    if moe is not None and moe.lora_rank is not None:
        rule = "LoRA experts are not in engine: megatron"
        problems.append(Problem("model.moe.lora_rank", rule, f"remove it, or {NATIVE}"))
    if moe is not None and moe.bias and degrees.etp > 1:
        rule = "experts with biases are not split along their inner size in engine: megatron"
        problems.append(Problem("model.moe.bias", rule, f"set etp: 1 or bias: false, or {NATIVE}"))
    return problems


def _training(config: Config) -> list[Problem]:
    t, problems = config.train, []
    if t.freeze:
        rule = "frozen parameters are not in engine: megatron"
        problems.append(Problem("train.freeze", rule, f"remove it, or {NATIVE}"))
    if t.compile:
        rule = "torch.compile of blocks is not in engine: megatron"
        problems.append(Problem("train.compile", rule, f"set it to false, or {NATIVE}"))
    return problems
