"""Finds tensors with numbers that are not finite, and orders names as the model does."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor


def nonfinite(tensors: Mapping[str, Tensor], order: float = inf) -> list[str]:
    """Names of the tensors whose norm of `order` is not finite; one wait of the host for all of them.

    tensors: floating point, on one device, of any shapes and none a DTensor. Order inf is the largest magnitude: not
    finite where an element is not. Order 2 is what gradients are clipped by, and overflows before an element does.
    """
    held = {name: x.detach() for name, x in tensors.items() if x.numel() and x.is_floating_point()}
    if not held:
        return []
    norms = torch._foreach_norm(list(held.values()), order)
    fine = torch.stack([norm.float() for norm in norms]).isfinite().tolist()
    return [name for name, is_fine in zip(held, fine, strict=True) if not is_fine]


def place(name: str) -> tuple[int, list[tuple[int, str]]]:
    """A sort key for names of parameters and buffers: embedding, layers by number, then the rest.

    All ranks sort alike by it, whatever they hold.
    """
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
    return 0 if name.startswith("embed") else 1 if name.startswith("layers") else 2, parts
