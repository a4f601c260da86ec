"""Asynchronous copies from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor on `device`; the host does not wait for it.

    x may have any shape.

    A copy from pageable memory would make the host wait for all earlier work of the stream.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
