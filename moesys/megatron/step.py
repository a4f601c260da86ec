"""A step of Megatron's optimizers that does nothing if the gradients are not finite.

Without a loss scale, which float32 and bfloat16 do not use, the `step` of Megatron-Core 0.16.1 updates whatever the
norm is. Here its public parts are called in its order, with a test of the norm between them.
"""

from __future__ import annotations

from math import isfinite, nan
from typing import Any

import torch


@torch.no_grad()
def step(optimizer: Any) -> float:
    """Clip and update by a `ChainedOptimizer`, as its `step` does; the gradients' norm before that.

    If the norm is not finite, nothing is clipped or updated. All ranks agree on it.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    if optimizer.prepare_grads():
        return nan
    norm = float(optimizer.get_grad_norm())
    if not isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and not part.is_stub_optimizer and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
