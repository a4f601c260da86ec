"""NVIDIA apex's FusedAdam behind torch's interface of optimizers, on parameters of any layout.

FusedAdam does not know DTensors, and counts its steps in its parameter groups. Here it gets this rank's parts of
parameters as plain tensors. Each parameter's state is the same as torch's AdamW keeps: "step", "exp_avg" and
"exp_avg_sq", laid out as the parameter is. So each optimizer can continue the other's checkpoints, on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moesys.errors import MoesysError
from moesys.parallel.gradients import local

SLOTS = ("exp_avg", "exp_avg_sq")
SETTINGS = ("lr", "betas", "eps", "weight_decay")


class ApexAdam(torch.optim.Optimizer):
    """Adam with decoupled decay (Loshchilov and Hutter 2019) by `apex.optimizers.FusedAdam`.

    Args:
        groups: parameter groups, float32, plain or DTensors; all parameters of a group take the same steps.
        settings: lr, betas, eps.

    Raises:
        MoesysError: apex is not installed, is another project, or was built without its CUDA extensions.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any):
        super().__init__(groups, settings | {"weight_decay": 0.0})
        self._parts = {p: nn.Parameter(_part(p)) for group in self.param_groups for p in group["params"]}
        # A part without elements would keep apex from updating the parameters before it in a group.
        held = [[self._parts[p] for p in group["params"] if _part(p).numel()] for group in self.param_groups]
        try:
            from apex.optimizers import FusedAdam

            self._apex = FusedAdam([{"params": parts} for parts in held], adam_w_mode=True, **settings)
        except (ImportError, RuntimeError) as error:
            rule = f"train.optimizer.kind: apex: FusedAdam cannot be used: {error}"
            remedy = "build NVIDIA/apex from source with its CUDA extensions, or set it to adamw"
            raise MoesysError(f"{rule}\n    remedy: {remedy}") from None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for ours, theirs in zip(self.param_groups, self._apex.param_groups, strict=True):
            theirs.update({key: ours[key] for key in SETTINGS})
            for p in ours["params"]:
                self._lend(p)
            if ours["params"]:
                theirs["step"] = int(self.state[ours["params"][0]]["step"])
        self._apex.step()
        for group in self.param_groups:
            for p in group["params"]:
                self._parts[p].grad = None
                self.state[p]["step"] += 1

    def _lend(self, p: nn.Parameter) -> None:
        """Give FusedAdam this rank's part of a parameter, of its gradient and of its state."""
        state, part = self.state[p], self._parts[p]
        if not state:
            state.update({slot: torch.zeros_like(p.detach()) for slot in SLOTS}, step=torch.zeros(()))
        # Sharding may have replaced the tensor that a parameter is a view of.
        part.data = _part(p)
        part.grad = None if p.grad is None else local(p.grad).contiguous()
        if part.numel():
            self._apex.state[part] = {slot: local(state[slot]) for slot in SLOTS}


def _part(p: nn.Parameter) -> Tensor:
    return local(p.detach())
