"""Parameters that training leaves as they are: those that `train.freeze` names, and the base of LoRA experts.

A frozen parameter has no gradient and no state in the optimizer; checkpoints hold its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from moesys.config.schema import Config, ModelConfig
from moesys.errors import Problem
from moesys.models.size import frozen, weights

if TYPE_CHECKING:
    from torch.nn import Module


def check(config: Config) -> list[Problem]:
    """Patterns that name nothing; a model with nothing left to train."""
    names, patterns = [w.name for w in weights(config.model, 1)], config.train.freeze
    problems = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            rule = f"{pattern!r} matches no parameter"
            remedy = f"use names such as {names[0]} or {names[1]}, with * for any text"
            problems.append(Problem("train.freeze", rule, remedy))
    if len(frozen_names(config.model, patterns)) == len(names):
        rule = f"({', '.join(patterns)}) leaves nothing to train"
        problems.append(Problem("train.freeze", rule, "leave some parameters out"))
    return problems


def frozen_names(model: ModelConfig, patterns: Sequence[str]) -> set[str]:
    """The names of all parameters of the model that are frozen."""
    return {w.name for w in weights(model, 1) if frozen(w, patterns)}


def apply(model: Module, config: Config) -> None:
    """Let no gradient be computed for the frozen parameters of a part of the model."""
    from moesys.parallel.initialise import canonical

    names = frozen_names(config.model, config.train.freeze)
    for name, parameter in model.named_parameters():
        if canonical(name, config.model.tie_embeddings) in names:
            parameter.requires_grad_(False)
