"""The optimizer and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.config.schema import OptimizerConfig, TrainConfig
from moesys.train.apex_adam import ApexAdam
from moesys.train.validate import decay_steps


def build(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], decays: Callable[[str], bool]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with decay on those parameters whose names it `decays`: matrices.

    `parameters`, by their layout-independent names, may be plain or DTensors of any mesh; their states are laid out
    alike. Parameters that need no gradient are left out.
    """
    # One group per kind and mesh: the fused update takes tensors of one mesh at a time.
    groups: dict[tuple[bool, Any], dict[str, Any]] = {}
    for name, p in ((name, p) for name, p in parameters.items() if p.requires_grad):
        decay = config.weight_decay if decays(name) else 0.0
        key = (decays(name), p.device_mesh if isinstance(p, DTensor) else None)
        groups.setdefault(key, {"params": [], "weight_decay": decay})["params"].append(p)
    if not groups:  # a pipeline stage whose parameters are all frozen
        groups[False, None] = {"params": [], "weight_decay": 0.0}
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.kind == "apex":
        return ApexAdam(groups.values(), **settings)
    return torch.optim.AdamW(list(groups.values()), fused=True, **settings)


def step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Update, unless `skipped`, a bool [] on the parameters' device, for which the host does not wait.

    Fused optimizers read `found_inf` on the device, as torch.amp.GradScaler sets it: if it is 1, neither parameters nor
    their state change, the count of steps included. Other optimizers need the host to decide.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


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
