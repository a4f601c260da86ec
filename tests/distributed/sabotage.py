"""Changes that tests make inside worker processes, importable by name."""

from __future__ import annotations


def forget_the_experts() -> None:
    """Break one rule: leave the gradients of experts unreduced over their data ranks."""
    from moesys.parallel.gradients import Gradients

    Gradients._experts = lambda self, ids: []  # type: ignore[method-assign]


def send_everything_to_the_first_expert() -> None:
    """All tokens choose expert 0, whatever the weights."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate

    from moesys.moe.gates.top_k import GateProjection

    plain = GateProjection.forward

    def forward(self: GateProjection, x: torch.Tensor) -> torch.Tensor:
        logits = plain(self, x)
        push = 100.0 * torch.nn.functional.one_hot(torch.tensor(0), logits.shape[-1])
        if isinstance(logits, DTensor):
            push = DTensor.from_local(push, logits.device_mesh, [Replicate()], run_check=False)
        return logits + push

    GateProjection.forward = forward  # type: ignore[method-assign]
