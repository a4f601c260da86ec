"""The optimizer and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi

import torch
from torch import nn

from moesys.config.schema import OptimizerConfig, TrainConfig
from moesys.train.checked import decay_steps


def build(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with decay on matrices only.

    Parameters may be plain or DTensors of any mesh; states are laid out as they are.
    """
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.kind == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, the first being 1.

    Linear warm-up, then cosine decay to `min_ratio · lr` (arXiv 1608.03983); or wsd: constant, with a
    linear decay over the last steps (arXiv 2404.06395); or constant.
    """
    s, peak = config.schedule, config.optimizer.lr
    if step <= s.warmup:
        return peak * step / s.warmup
    if s.kind == "constant":
        return peak
    if s.kind == "wsd":
        progress = max(0.0, (step - (config.steps - decay_steps(config))) / decay_steps(config))
        return peak * (1 - (1 - s.min_ratio) * min(1.0, progress))
    progress = min(1.0, (step - s.warmup) / max(1, config.steps - s.warmup))
    return peak * (s.min_ratio + (1 - s.min_ratio) * (1 + cos(pi * progress)) / 2)
