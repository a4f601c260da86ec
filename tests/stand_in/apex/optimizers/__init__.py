"""FusedAdam as NVIDIA/apex has it in apex/optimizers/fused_adam.py, with plain products in place of its kernel."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class FusedAdam(torch.optim.Optimizer):
    """One step count per group, under "step", from the first step on; states made when a gradient first comes."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        if amsgrad or capturable or master_weights:
            raise RuntimeError("not in this stand-in")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if len(group["params"]) == 0:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            lists = [self._lists(p) for p in group["params"] if p.grad is not None]
            for tensors in lists:
                self._kernel(*tensors, group)

    def _lists(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        state = self.state[p]
        if len(state) == 0:
            state["exp_avg"] = torch.zeros_like(p.data).float()
            state["exp_avg_sq"] = torch.zeros_like(p.data).float()
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise RuntimeError("FusedAdam only support fp16 and fp32.")
        tensors = (p.grad.data, p.data, state["exp_avg"], state["exp_avg_sq"])
        # The kernel reads plain memory, and launches nothing of a list that ends without elements.
        assert not any(isinstance(t, DTensor) for t in tensors)
        assert all(t.is_contiguous() and t.numel() for t in tensors)
        return tensors

    def _kernel(self, g: torch.Tensor, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, group: Any) -> None:
        beta1, beta2 = group["betas"]
        decay, step = group["weight_decay"], group["step"]
        one, two = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        if not self.adam_w_mode:
            g = g + decay * p
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / one) / (v.sqrt() / sqrt(two) + group["eps"])
        if self.adam_w_mode:
            update = update + decay * p
        p.sub_(update, alpha=group["lr"])
