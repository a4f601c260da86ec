"""Detection of recomputed forward passes, whose tokens are counted already."""

from __future__ import annotations

import torch


# Evaluated whenever compiled code runs, not once at compile time: checkpointing runs the same code twice.
@torch.compiler.disable
def recomputing() -> bool:
    """Whether this forward pass runs inside of a backward pass: then it repeats one whose tokens were counted.

    This holds for every kind of checkpointing: torch's, reentrant or not, Megatron's, Transformer Engine's. torch has
    no public function for it; its own checkpointing uses the same one.
    """
    return bool(torch._C._current_graph_task_id() != -1)
