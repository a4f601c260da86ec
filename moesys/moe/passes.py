"""Forward passes that count no token again."""

from __future__ import annotations

import torch


# Asked whenever compiled code runs, not once when it is compiled: checkpointing runs the same code again.
@torch.compiler.disable
def recomputing() -> bool:
    """Whether a forward pass runs inside of a backward pass: it repeats one, whose tokens were counted then.

    So it is with every kind of checkpointing: torch's, reentrant or not, Megatron's, Transformer Engine's. Torch
    has no public question for this; its own checkpointing asks the same.
    """
    return bool(torch._C._current_graph_task_id() != -1)
