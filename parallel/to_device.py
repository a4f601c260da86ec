"""Copies from the host to the device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; its stream copies when it gets there, and the host goes on at once.

    A copy from memory that may be paged out makes the host wait for all that the stream has still to do.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
